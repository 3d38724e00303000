"""When the `triton` backend serves `saliency`, and its self-check."""

from collections.abc import Callable
from functools import partial

import torch

from reap_kernels import selfcheck
from reap_kernels.dispatch import Backend, Request
from reap_kernels.saliency import reference
from reap_kernels.saliency.stage_kernels import accumulate, stage_kernels
from reap_kernels.sort.triton_backend import limits, priority
from reap_kernels.stats import COUNTS, SUMS, LayerStats
from reap_kernels.testing import Case, largest_relative_error, make_inputs

# Norms accumulate in float32, sums in float64.
SUM_BOUND = 1e-6


def refusal(request: Request) -> str | None:
    """Why `accumulate` cannot be served, or None."""
    return limits(request) or selfcheck.verdict(
        "saliency",
        request.device,
        {"dtype": request.dtype},
        lambda: check(prepare(request), request),
    )


def prepare(request: Request) -> Callable[..., None]:
    """See `reap_kernels.saliency.op.accumulate`."""
    return partial(accumulate, stage_kernels("triton", "triton"))


def check(run: Callable[..., None], request: Request) -> str | None:
    """Compares statistics of given outputs with the reference's."""
    case = Case("self-check", "all of it", 300, 7, 2, hidden=1100, skew="zipf", foreign=0.1)
    inputs = make_inputs(case, request.dtype, device=request.device)
    ids, router_weights = inputs.topk_ids[:, 0], inputs.topk_weights[:, 0]
    mask, group = router_weights > 0.2, torch.arange(case.tokens, device=request.device) % 3
    got, want = (LayerStats(case.experts, 3, request.device) for _ in range(2))
    run(inputs.hidden, ids, router_weights, got, mask, group)
    reference.accumulate(inputs.hidden, ids, router_weights, want, mask, group)
    return difference(got, want, SUM_BOUND)


def difference(got: LayerStats, want: LayerStats, bound: float) -> str | None:
    """How statistics differ from the reference's, or None: counts exactly, sums within `bound`."""
    for name in COUNTS:
        if not torch.equal(getattr(got, name), getattr(want, name)):
            return f"{name} differs from the reference's"
    for name in SUMS:
        error = largest_relative_error(getattr(got, name), getattr(want, name))
        if not error <= bound:
            return f"{name} is off by {error:.1e}, {bound:.0e} is allowed"
    return None


BACKEND = Backend("saliency", "triton", priority, refusal, prepare)
