"""The comparison of logits on a GPU: its time beside torch's."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.machine import Machine
from bench.gpu.parts import DTYPE, Part, Prepared
from bench.gpu.verify import CheckFailed
from reap_kernels.testing import Case

NAME = "compare logits"


def pair(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Logits of a model and of one like it; some tokens of the first are impossible."""
    rng = torch.Generator(device).manual_seed(4)

    def normal() -> Tensor:
        return torch.randn(rows, vocabulary, generator=rng, device=device)

    full = 3 * normal()
    candidate = full + torch.linspace(0, 1, rows, device=device)[:, None] * normal()
    full[::4, 1::3] = -torch.inf
    return [logits.to(dtype) for logits in (full, candidate)]


def of_vocabulary(machine: Machine) -> list[Part]:
    """Our kernel, and what torch does for acceptance alone: two softmaxes and their minimum."""
    rows, vocabulary = (3, 257) if machine.smoke else (4096, 151936)
    case = Case("Qwen3's vocabulary", "timed", rows, 1, 1, vocabulary, 0)
    ours = partial(rk.compare_logits, backend="triton")
    return [
        Part(case, NAME, name, partial(_prepared, machine, case, compare))
        for name, compare in (("triton", lambda *both: ours(*both).acceptance), ("torch", _naive))
    ]


def _naive(full: Tensor, candidate: Tensor) -> Tensor:
    p, q = (logits.float().softmax(dim=-1) for logits in (full, candidate))
    return torch.minimum(p, q).sum(dim=-1)


def _prepared(
    machine: Machine, case: Case, compare: Callable[[Tensor, Tensor], Tensor]
) -> Prepared:
    full, candidate = pair(case.tokens, case.hidden, DTYPE, machine.device)

    def verify() -> float:
        at = slice(0, case.tokens, max(1, case.tokens // 16))
        want = rk.compare_logits(full[at], candidate[at], backend="reference").acceptance
        error = float((compare(full, candidate)[at] - want).abs().max())
        if not error <= 1e-4:
            raise CheckFailed(f"acceptance is off by {error:.1e}, 1e-04 is allowed")
        return error

    return Prepared([partial(compare, full, candidate)], verify, full.nbytes + candidate.nbytes)
