"""When the `cuda` backend serves `layer`: compiled kernels around the products.

The sort, combination and reduction are CUDA kernels where the launch table does not say otherwise;
the products are Triton's, or torch's grouped_mm where the table prefers it. `wgmma_backend.py` has
a layer whose products are CUDA kernels too.
"""

from collections.abc import Callable

from torch import Tensor

from reap_kernels import cuda, selfcheck, tuning
from reap_kernels.dispatch import Backend, Request
from reap_kernels.experts.triton_backend import facts, launches, note, product_limits
from reap_kernels.gram import triton_backend as gram_backend
from reap_kernels.layer.call import LayerCall
from reap_kernels.layer.triton_backend import PRODUCTS, check, grouped_limits
from reap_kernels.saliency.stage_kernels import stage_kernels
from reap_kernels.sort.cuda_backend import limits
from reap_kernels.sort.cuda_backend import priority as stage_priority


def stage_backends(request: Request) -> dict[str, str]:
    """The backend of each stage of a request, by the launch table."""
    sizes = request.sizes
    call = (request.dtype, sizes.intermediate, sizes.rows)
    chosen = {op: tuning.choose_backend(request.device, op, *call) for op in ("sort", "saliency")}
    chosen["layer"] = tuning.choose_backend(request.device, "layer", *call, among=PRODUCTS)
    if chosen["layer"] == "grouped_mm" and grouped_limits(request) is not None:
        chosen["layer"] = "triton"
    return chosen


def priority(request: Request) -> int:
    """As its first stage has it."""
    return stage_priority(request._replace(op="sort"))


def stage_limits(request: Request) -> str | None:
    """Why the kernels around the products cannot serve, as far as is known without running them."""
    reason = limits(request)
    if reason is not None:
        return reason
    most = cuda.constant(request.device, "COMBINE_SLOTS")
    if request.sizes.top_k > most:
        return f"k = {request.sizes.top_k} is above {most}; `triton` has no limit"
    return None


def refusal(request: Request) -> str | None:
    """Why `layer` cannot be served, or None."""
    reason = stage_limits(request) or product_limits(request)
    if reason is None and request.gram:
        reason = gram_backend.refusal(request)
    if reason is not None:
        return reason
    chosen = stage_backends(request)
    return selfcheck.verdict(
        "layer.cuda",
        request.device,
        {**facts(request), **chosen, "module": cuda.digest(request.device)},
        lambda: check(prepare(request), chosen["layer"], request),
    )


def served(request: Request) -> str:
    """The backend of each stage, and what the products add."""
    if cuda.refusal(request.device) is not None:
        return ""
    chosen = stage_backends(request)
    text = f"sort by {chosen['sort']}, products by {chosen['layer']}, norms and sums by "
    return "; ".join(part for part in (text + chosen["saliency"], note(request)) if part)


def prepare(request: Request) -> Callable[[LayerCall], Tensor]:
    """See `reap_kernels.layer.op.observe_layer`."""
    from reap_kernels.layer import gpu

    chosen = stage_backends(request)
    around = stage_kernels(chosen["sort"], chosen["saliency"])
    return gpu.prepared(gpu.PRODUCTS[chosen["layer"]], around, launches(request), request)


BACKEND = Backend("layer", "cuda", priority, refusal, prepare, served)
