"""When the `triton` backend serves `cross`, and its self-check."""

from collections.abc import Callable
from functools import partial

import torch

from reap_kernels import selfcheck
from reap_kernels.cross import reference
from reap_kernels.dispatch import Backend, Request
from reap_kernels.experts.triton_backend import (
    check_layer,
    facts,
    launches,
    note,
    output_bound,
    product_limits,
)
from reap_kernels.sort.triton_backend import priority
from reap_kernels.testing import make_inputs, relative_error
from reap_kernels.tuning import Launch


def refusal(request: Request) -> str | None:
    """Why `cross` cannot be served, or None."""
    return product_limits(request) or selfcheck.verdict(
        "cross",
        request.device,
        {**facts(request), "outer": _outer(request)},
        lambda: check(request),
    )


def _outer(request: Request) -> Launch:
    from reap_kernels.gram.gpu import outer_launch

    return outer_launch(request, request.sizes.hidden, request.sizes.intermediate)


def prepare(request: Request) -> Callable[..., None]:
    """See `reap_kernels.cross.op.cross`."""
    from reap_kernels.cross import gpu

    return partial(gpu.cross, gpu.CrossKernels(launches(request).up, _outer(request)))


def check(request: Request) -> str | None:
    """Compares the moments of a small layer with the reference's."""
    case, experts = check_layer(request)
    inputs = make_inputs(case, request.dtype, device=request.device)
    targets = inputs.hidden.flip(0)
    shape = (case.experts, case.hidden, case.intermediate)
    got, want = (torch.zeros(shape, device=request.device) for _ in range(2))
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, targets)
    prepare(request)(*call, got)
    reference.cross(*call, want)
    error, bound = relative_error(got, want), output_bound(request.dtype)
    return None if error <= bound else f"moments are off by {error:.1e}, {bound:.0e} is allowed"


BACKEND = Backend("cross", "triton", priority, refusal, prepare, note)
