"""When the `triton` backend serves `gram`, and the self-check of outer products of sorted rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from reap_kernels import selfcheck
from reap_kernels.device import tf32
from reap_kernels.dispatch import Backend, Request
from reap_kernels.experts.triton_backend import output_bound
from reap_kernels.gram import reference
from reap_kernels.layer_gram import LayerGram
from reap_kernels.sort import reference as sort_reference
from reap_kernels.sort.triton_backend import limits, priority
from reap_kernels.testing import Case, make_inputs, relative_error


def refusal(request: Request) -> str | None:
    """Why `gram` cannot be served, or a layer's Gram matrices cannot be summed; or None."""
    return limits(request) or selfcheck.verdict(
        "gram", request.device, facts(request), lambda: check(request)
    )


def facts(request: Request) -> dict[str, Any]:
    """What the compiled products depend on."""
    from reap_kernels.gram.gpu import outer_launch

    launch = outer_launch(request, request.sizes.intermediate)
    return {
        "dtype": request.dtype,
        "intermediate": _small_width(request),
        "tf32": tf32(request.dtype),
        "outer": launch,
    }


def _small_width(request: Request) -> int:
    """I of a small call that compiles to the request's own code, of several block rows."""
    from reap_kernels.gram.gpu import outer_launch

    width = request.sizes.intermediate
    block = outer_launch(request, width).block_m
    return 2 * block + width % block


def prepare(request: Request) -> Callable[..., None]:
    """See `reap_kernels.gram.op.gram`."""
    from reap_kernels.gram.gpu import gram, outer_launch

    return partial(gram, outer_launch(request, request.sizes.intermediate))


def check(request: Request) -> str | None:
    """Compares the sums of given rows with the reference's; upper triangles are NaN and stay out
    of it.
    """
    where = request.device
    case = Case("self-check", "every boundary once", 300, 5, 2, _small_width(request), skew="zipf")
    inputs = make_inputs(case, request.dtype, device=where)
    routing = sort_reference.sort_by_expert(inputs.topk_ids, inputs.topk_weights, case.experts)
    h = inputs.hidden[routing.gather_index // case.top_k]
    factors = inputs.topk_weights.double()
    factors[::7] = 0.0
    h[(factors.reshape(-1) == 0)[routing.gather_index]] = torch.nan
    got, want = (LayerGram(case.experts, case.hidden, where) for _ in range(2))
    got.gram += torch.full(got.gram.shape[1:], torch.nan, device=where).triu(1)
    prepare(request)(h, routing, factors, got)
    reference.gram(h, routing, factors, want)
    return difference(got, want, output_bound(request.dtype))


def difference(got: LayerGram, want: LayerGram, bound: float) -> str | None:
    """How sums differ from the reference's, or None: counts exactly, the others within `bound`."""
    if not torch.equal(got.count, want.count):
        return "count differs from the reference's"
    seconds = ([sums.second(e) for e in range(sums.num_experts)] for sums in (got, want))
    pairs = {
        "gram": tuple(map(torch.stack, seconds)),
        "first": (got.first, want.first),
        "weight": (got.weight, want.weight),
    }
    for name, (ours, theirs) in pairs.items():
        error = relative_error(ours, theirs)
        if not error <= bound:
            return f"{name} is off by {error:.1e}, {bound:.0e} is allowed"
    return None


BACKEND = Backend("gram", "triton", priority, refusal, prepare)
