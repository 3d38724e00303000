"""When the `triton` backend serves `norm`, and its self-check; Triton is imported at first use."""

from collections.abc import Callable

import torch
from torch import Tensor

from reap_kernels import device, selfcheck
from reap_kernels.dispatch import Backend, Request
from reap_kernels.norm import reference
from reap_kernels.sort.triton_backend import priority

Norm = Callable[
    [Tensor, Tensor | None, Tensor | None, float, float, bool], tuple[Tensor, Tensor | None]
]

# Columns that a program holds in its registers.
MOST = 16384
# Programs hold up to 64 rows, and number them in 32 bits.
_MOST_ROWS = (1 << 31) - 64
# Relative errors of a result that was rounded once, and twice: of half a unit in the last place
# each, and of sums in float32.
BOUNDS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}


def limits(request: Request, width: int) -> str | None:
    """Why Triton cannot serve rows of `width` columns, as far as is known without running it."""
    reason = device.triton_refusal(request.device)
    if reason is not None:
        return reason
    if request.dtype == torch.float64:
        return "float64 is served by `reference` only"
    if width > MOST:
        return f"rows have {width} columns, its programs hold {MOST}"
    if request.sizes.tokens > _MOST_ROWS:
        return "rows reach 2^31, where their numbers overflow; pass fewer at once"
    return None


def refusal(request: Request) -> str | None:
    """Why `rms_norm` cannot be served, or None."""
    width = request.sizes.hidden
    return limits(request, width) or selfcheck.verdict(
        "norm",
        request.device,
        {"dtype": request.dtype, "width": width},
        lambda: check(prepare(request), request),
    )


def prepare(request: Request) -> Norm:
    """See `reap_kernels.norm.op.rms_norm`."""
    from reap_kernels.norm import gpu

    return gpu.rms_norm


def check(run: Norm, request: Request) -> str | None:
    """Compares with the reference's results, alone and of a sum, rounded once and twice."""
    rng = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(7, request.sizes.hidden, generator=rng).to(request.device, request.dtype)
        for _ in range(2)
    )
    weight = torch.randn(request.sizes.hidden, generator=rng).to(request.device, request.dtype)
    for added, offset, round_first in ((None, 1.0, False), (residual, 0.0, True)):
        out, total = run(x, weight, added, 1e-6, offset, round_first)
        want, want_total = reference.rms_norm(x, weight, added, 1e-6, offset, round_first)
        if total is not None and want_total is not None and not torch.equal(total, want_total):
            return "the sum differs from the reference's"
        reason = off(out, want, (3 if round_first else 2) * BOUNDS[request.dtype])
        if reason is not None:
            return reason
    return None


def off(got: Tensor, want: Tensor, bound: float) -> str | None:
    """What is wrong with a result of which each element may be off by `bound` of its size."""
    error = (got.double() - want.double()).abs()
    worst = float((error / want.double().abs().clamp(min=1e-3)).max())
    return None if worst <= bound else f"the norm is off by {worst:.1e}, {bound:.0e} is allowed"


BACKEND = Backend("norm", "triton", priority, refusal, prepare)
