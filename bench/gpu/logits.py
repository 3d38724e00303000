"""The comparison of logits on a GPU: its checks against float64, and its time beside torch's."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.checks import Check, CheckFailed, poisoned
from bench.gpu.machine import Machine
from bench.gpu.parts import DTYPE, Part, Prepared
from reap_kernels.testing import Case

NAME = "compare logits"
# Rows and vocabulary: Qwen3's; a prime, whose rows begin anywhere; one row of one token.
SIZES = ((64, 151936), (17, 50261), (1, 1))
_SMOKE = ((3, 257),)
# Absolute below 1, relative above; see `reap_kernels.compare_logits`.
_BOUND = 2e-6


def _pair(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Logits of a model and of one like it; some tokens of the first are impossible."""
    rng = torch.Generator(device).manual_seed(4)

    def normal() -> Tensor:
        return torch.randn(rows, vocabulary, generator=rng, device=device)

    full = 3 * normal()
    candidate = full + torch.linspace(0, 1, rows, device=device)[:, None] * normal()
    full[::4, 1::3] = -torch.inf
    return [logits.to(dtype) for logits in (full, candidate)]


def compared(
    device: torch.device, backend: str, dtype: torch.dtype, rows: int, vocabulary: int
) -> str:
    """Every result against float64's, with and without a known log-sum-exp, twice the same bits."""
    pair = _pair(rows, vocabulary, dtype, device)
    want = rk.compare_logits(*pair, backend="reference")
    worst = 0.0
    for known in (None, want.full_lse):
        with poisoned():
            got, again = (
                rk.compare_logits(*pair, full_lse=known, backend=backend) for _ in range(2)
            )
        for name in ("acceptance", "kl", "full_lse", "candidate_lse"):
            ours, theirs = getattr(got, name), getattr(want, name)
            error = float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())
            worst = max(worst, error)
            if not error <= _BOUND:
                raise CheckFailed(f"{name} is off by {error:.1e}, {_BOUND:.0e} is allowed")
            if not torch.equal(ours, getattr(again, name)):
                raise CheckFailed(f"{name} has other bits the second time")
        if not torch.equal(got.same_top, want.same_top):
            raise CheckFailed("same_top differs")
    return f"all within {worst:.1e}"


def checks(smoke: bool) -> list[Check]:
    """All sizes and dtypes."""
    dtypes = (torch.float32,) if smoke else (torch.bfloat16, torch.float32, torch.float16)
    return [
        Check(f"{NAME} {rows} x {vocabulary}", "triton", dtype, compared, (rows, vocabulary))
        for dtype in dtypes
        for rows, vocabulary in (_SMOKE if smoke else SIZES)
    ]


def of_vocabulary(machine: Machine) -> list[Part]:
    """Our kernel, and what torch does for acceptance alone: two softmaxes and their minimum."""
    rows, vocabulary = (3, 257) if machine.smoke else (4096, 151936)
    case = Case("Qwen3's vocabulary", "timed", rows, 1, 1, vocabulary, 0)
    ours = partial(rk.compare_logits, backend="triton")
    return [
        Part(case, NAME, name, partial(_prepared, machine, case, compare))
        for name, compare in (("triton", lambda *pair: ours(*pair).acceptance), ("torch", _naive))
    ]


def _naive(full: Tensor, candidate: Tensor) -> Tensor:
    p, q = (logits.float().softmax(dim=-1) for logits in (full, candidate))
    return torch.minimum(p, q).sum(dim=-1)


def _prepared(
    machine: Machine, case: Case, compare: Callable[[Tensor, Tensor], Tensor]
) -> Prepared:
    full, candidate = _pair(case.tokens, case.hidden, DTYPE, machine.device)

    def verify() -> float:
        at = slice(0, case.tokens, max(1, case.tokens // 16))
        want = rk.compare_logits(full[at], candidate[at], backend="reference").acceptance
        error = float((compare(full, candidate)[at] - want).abs().max())
        if not error <= 1e-4:
            raise CheckFailed(f"acceptance is off by {error:.1e}, 1e-04 is allowed")
        return error

    return Prepared([partial(compare, full, candidate)], verify, full.nbytes + candidate.nbytes)
