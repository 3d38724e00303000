"""When `wgmma` serves `layer`: all of it by CUDA kernels for Hopper, in one call.

It is chosen where a launch table says so, or by name. No shipped table does yet, since it has not
run on a GPU.
"""

from collections.abc import Callable

from torch import Tensor

from reap_kernels import cuda, selfcheck, tuning
from reap_kernels.activation import KINDS
from reap_kernels.dispatch import Backend, Request
from reap_kernels.experts.kernel_cuda import CHUNK, DTYPES, device_refusal
from reap_kernels.experts.triton_backend import facts
from reap_kernels.layer.call import LayerCall
from reap_kernels.layer.cuda_backend import stage_limits
from reap_kernels.layer.triton_backend import check

# Below `reference`, which always serves: it is never what is left when others refuse.
_NEVER = -1
_FIRST = 40


def priority(request: Request) -> int:
    """Before all others where the launch table names it, else after all."""
    if request.device.type not in ("cpu", "cuda"):  # such a device has no launch table
        return _NEVER
    sizes = request.sizes
    chosen = tuning.choose_backend(
        request.device, "layer", request.dtype, sizes.intermediate, sizes.rows
    )
    return _FIRST if chosen == "wgmma" else _NEVER


def limits(request: Request) -> str | None:
    """Why it cannot serve a request, as far as is known without running anything."""
    reason = stage_limits(request) or device_refusal(request.device)
    if reason is not None:
        return reason
    if request.dtype not in DTYPES:
        return f"it multiplies bfloat16 and float16, not {request.dtype}"
    if request.gram:
        return "it keeps no inner activations for Gram matrices; `triton` does"
    if request.activation not in KINDS or request.activation == "opaque":
        return f"it has no kernel for the activation {request.activation!r}; `triton` serves it"
    if request.layout == "quantized":
        return "it reads bf16 and fp16 weights; `triton` dequantizes experts by chunks"
    for name in ("hidden", "intermediate"):
        size = getattr(request.sizes, name)
        if size % CHUNK:
            return f"TMA reads multiples of {CHUNK} elements; {name} is {size}"
    if not request.boxes:
        return (
            "TMA reads weights whose rows are contiguous and begin at multiples of 16 bytes, with "
            "the same strides for all experts, gate and up"
        )
    return None


def refusal(request: Request) -> str | None:
    """Why `layer` cannot be served, or None."""
    return limits(request) or selfcheck.verdict(
        "layer.wgmma",
        request.device,
        {**facts(request), "boxes": request.boxes, "module": cuda.digest(request.device)},
        lambda: check(prepare(request), "wgmma", request),
    )


def prepare(request: Request) -> Callable[[LayerCall], Tensor]:
    """See `reap_kernels.layer.op.observe_layer`."""
    from reap_kernels.layer import kernel_cuda

    return kernel_cuda.observe_layer


BACKEND = Backend("layer", "wgmma", priority, refusal, prepare)
