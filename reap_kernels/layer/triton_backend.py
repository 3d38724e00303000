"""When `triton` and `grouped_mm` serve `layer`, and the self-check of the whole pass.

Both run our kernels around the products; `grouped_mm` leaves the products to torch, which a launch
table prefers where it is faster.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from reap_kernels import device, selfcheck, tuning
from reap_kernels.dispatch import Backend, Request
from reap_kernels.experts.triton_backend import (
    check_layer,
    facts,
    launches,
    note,
    output_bound,
    product_limits,
)
from reap_kernels.gram import triton_backend as gram_backend
from reap_kernels.layer import reference
from reap_kernels.layer.call import LayerCall
from reap_kernels.saliency.stage_kernels import stage_kernels
from reap_kernels.saliency.triton_backend import difference
from reap_kernels.sort.triton_backend import priority
from reap_kernels.stats import LayerStats
from reap_kernels.testing import make_inputs, relative_error

# Products that kernels of ours stand around; what else the table names computes a layer whole.
PRODUCTS = ("triton", "grouped_mm")
# Sums may be off by twice what outputs are: squares enter two of them.
_SUMS = 2.0
# Outputs are off by more with grouped_mm, which rounds the first product before the activation, as
# eager models do.
_ROUNDED = {"triton": 1.0, "wgmma": 1.0, "grouped_mm": 1.6}


def refusal(products: str, request: Request) -> str | None:
    """Why `layer` cannot be served with these products, or None."""
    reason = product_limits(request)
    if reason is None and request.gram:
        reason = gram_backend.refusal(request)
    if reason is None and products == "grouped_mm":
        reason = grouped_limits(request)
    return reason or selfcheck.verdict(
        f"layer.{products}",
        request.device,
        facts(request),
        lambda: check(prepare(products, request), products, request),
    )


def grouped_limits(request: Request) -> str | None:
    """Why torch's grouped_mm cannot serve without waiting for the device or copying weights."""
    where = request.device
    if where.type == "cuda":
        arch = device.architecture(where)
        if arch not in ("sm90", "sm100"):
            return f"torch's grouped_mm loops over experts on {arch}, waiting for the device"
        if request.dtype != torch.bfloat16:
            return f"torch's grouped_mm is fast for bfloat16 only, not for {request.dtype}"
    if request.layout == "quantized":
        return "torch's grouped_mm reads bf16 weights; `triton` dequantizes experts by chunks"
    if request.layout != "stacked":
        return "torch's grouped_mm takes experts stacked in one tensor"
    if request.biased:
        return "torch's grouped_mm adds no bias"
    if request.activation == "opaque":
        return "an opaque activation is served by `triton`"
    for name in ("hidden", "intermediate"):
        size = getattr(request.sizes, name)
        if size % 8:
            return f"torch's grouped_mm needs sizes that are multiples of 8; {name} is {size}"
    return None


def grouped_priority(request: Request) -> int:
    """Before `triton` where the launch table says so, else right after it."""
    sizes = request.sizes
    if device.triton_refusal(request.device) is not None:
        return priority(request) - 1
    products = tuning.choose_backend(
        request.device, "layer", request.dtype, sizes.intermediate, sizes.rows, among=PRODUCTS
    )
    return priority(request) + (1 if products == "grouped_mm" else -1)


def prepare(products: str, request: Request) -> Callable[[LayerCall], Tensor]:
    """See `reap_kernels.layer.op.observe_layer`; `products` names their backend."""
    from reap_kernels.layer import gpu

    around = stage_kernels("triton", "triton")
    return gpu.prepared(gpu.PRODUCTS[products], around, launches(request), request)


def check(run: Callable[[LayerCall], Tensor], products: str, request: Request) -> str | None:
    """Compares output and statistics of a small layer with the reference's.

    Args:
        run: computes the layer, prepared for the request.
        products: backend of its products, which rounding depends on.
        request: the call.
    """
    case, experts = check_layer(request)
    inputs = make_inputs(case, request.dtype, device=request.device)
    mask = inputs.hidden[:, 0] > -1.5
    group = torch.arange(case.tokens, device=request.device) % 2
    got, want = (LayerStats(case.experts, 2, request.device) for _ in range(2))
    arguments = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts)
    out = run(LayerCall(*arguments, got, mask, group))
    truth = reference.observe_layer(LayerCall(*arguments, want, mask, group))
    bound = _ROUNDED[products] * output_bound(request.dtype)
    error = relative_error(out, truth)
    if not error <= bound:
        return f"the output is off by {error:.1e}, {bound:.0e} is allowed"
    return difference(got, want, _SUMS * bound)


BACKENDS = (
    Backend(
        "layer", "triton", priority, partial(refusal, "triton"), partial(prepare, "triton"), note
    ),
    Backend(
        "layer",
        "grouped_mm",
        grouped_priority,
        partial(refusal, "grouped_mm"),
        partial(prepare, "grouped_mm"),
    ),
)
assert tuple(backend.name for backend in BACKENDS) == PRODUCTS
