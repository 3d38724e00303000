"""Norms and rotations of queries and keys on a GPU: time beside a model's own operations."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.machine import Machine
from bench.gpu.parts import DTYPE, Part, Prepared
from bench.gpu.verify import CheckFailed
from reap_kernels.testing import Case

NORM, ADDED, ROTARY = "norm", "sum and norm", "norm and rotary"
EPS = 1e-6
# The largest share of elements whose bits may differ from those of the model's operations.
DIFFERING = 0.01
# Calls in turn, with inputs of their own, so that none finds those of the last one in the cache.
_CALLS = 3


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As Llama and Qwen3 compute it."""
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * y.to(x.dtype)


def eager_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Qwen3 computes it, from heads [B, S, heads, D] to [B, heads, S, D]."""
    y = eager_norm(x, weight).transpose(1, 2)
    a, b = y.chunk(2, dim=-1)
    return (y * cos.unsqueeze(1)) + (torch.cat((-b, a), dim=-1) * sin.unsqueeze(1))


def differing(got: Sequence[Tensor], want: Sequence[Tensor], units: float) -> float:
    """The share of elements that differ.

    Raises:
        CheckFailed: it is above `DIFFERING` in 16 bits, or a difference above `units` units in the
            last place of the largest element of its row.
    """
    worst = 0.0
    for ours, theirs in zip(got, want, strict=True):
        unit = torch.finfo(ours.dtype).eps * theirs.abs().amax(dim=-1, keepdim=True).float()
        apart = ((ours.float() - theirs.float()).abs() / unit.clamp(min=1e-30)).max()
        if not float(apart) <= units:
            raise CheckFailed(f"off by {float(apart):.1f} units, {units} are allowed")
        share = float((ours != theirs).float().mean())
        if ours.dtype != torch.float32 and share > DIFFERING:
            raise CheckFailed(f"{share:.1%} of the elements differ, {DIFFERING:.0%} may")
        worst = max(worst, share)
    return worst


def of_norms(machine: Machine) -> list[Part]:
    """Qwen3-30B-A3B's on 16,384 tokens: of hidden states, alone and added, and of heads."""
    tokens, width = (1, 64) if machine.smoke else (16384, 2048)
    case = Case("Qwen3-30B-A3B", "timed", tokens, 1, 1, width, 0)
    return [
        Part(case, name, variant, partial(prepare, machine, case, variant))
        for name, prepare in (
            (NORM, partial(_normed, added=False)),
            (ADDED, partial(_normed, added=True)),
            (ROTARY, _rotated),
        )
        for variant in ("triton", "torch")
    ]


def _normed(machine: Machine, case: Case, variant: str, added: bool) -> Prepared:
    rng = torch.Generator(machine.device).manual_seed(5)
    x, residual = (
        _normal(machine, rng, _CALLS, 1, case.tokens, case.hidden) for _ in range(2)
    )  # fmt: skip
    weight = _normal(machine, rng, case.hidden)

    def ours(n: int) -> tuple[Tensor, ...]:
        form = {"round_first": True, "backend": "triton"}
        if added:
            return rk.rms_norm(x[n], weight, EPS, residual=residual[n], **form)
        return (rk.rms_norm(x[n], weight, EPS, **form),)

    def theirs(n: int) -> tuple[Tensor, ...]:
        if not added:
            return (eager_norm(x[n], weight),)
        total = residual[n] + x[n]
        return eager_norm(total, weight), total

    return _prepared(ours, theirs, variant, (4 if added else 2) * x[0].nbytes)


def _rotated(machine: Machine, case: Case, variant: str) -> Prepared:
    rng = torch.Generator(machine.device).manual_seed(6)
    q, k = (_normal(machine, rng, _CALLS, 1, case.tokens, heads, 128) for heads in (32, 4))
    weights = [_normal(machine, rng, 128) for _ in range(2)]
    angles = _normal(machine, rng, 1, case.tokens, 64).float().repeat(1, 1, 2)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)

    def ours(n: int) -> tuple[Tensor, ...]:
        named = dict(zip(("q_weight", "k_weight"), weights, strict=True))
        heads = (x[n].transpose(1, 2) for x in (q, k))
        turned, keys = rk.rotary(
            *heads, cos, sin, **named, eps=EPS, round_first=True, backend="triton"
        )
        assert keys is not None
        return turned, keys

    def theirs(n: int) -> tuple[Tensor, ...]:
        pairs = zip((q[n], k[n]), weights, strict=True)
        return tuple(eager_rotary(x, weight, cos, sin) for x, weight in pairs)

    moved = 2 * (q[0].nbytes + k[0].nbytes) + cos.nbytes + sin.nbytes
    return _prepared(ours, theirs, variant, moved)


def _prepared(
    ours: Callable[[int], tuple[Tensor, ...]],
    theirs: Callable[[int], tuple[Tensor, ...]],
    variant: str,
    moved: int,
) -> Prepared:
    """Calls of one of both; the check compares them, whichever is timed."""
    calls = [partial(ours if variant == "triton" else theirs, n) for n in range(_CALLS)]
    return Prepared(calls, lambda: differing(ours(0), theirs(0), 4), moved)


def _normal(machine: Machine, rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, device=machine.device).to(DTYPE)
