"""When the `cuda` backend serves `dequant`, and its self-check."""

from collections.abc import Callable

import torch
from torch import Tensor

from reap_kernels import cuda, selfcheck
from reap_kernels.dequant import reference
from reap_kernels.dispatch import Backend, Request
from reap_kernels.quantized import FORMATS, Quantized
from reap_kernels.testing import make_quantized

_MOST_EXPERTS = 65535
# E, N, K: several blocks of threads, a partial one, partial FP8 blocks; and rows that begin nowhere
# near a multiple of 16 bytes, which only FP8 has.
_SIZES = ((3, 200, 416), (2, 35, 75))


def priority(request: Request) -> int:
    """Before torch's operations on a GPU; after them where kernels run as built for tests."""
    return 30 if request.device.type == "cuda" else -1


def limits(request: Request) -> str | None:
    """Why CUDA kernels cannot serve a request, as far as is known without running anything."""
    reason = cuda.refusal(request.device)
    if reason is not None:
        return reason
    sizes = request.sizes
    if sizes.experts > _MOST_EXPERTS:
        return f"{sizes.experts} experts are more than a launch has, {_MOST_EXPERTS}"
    if sizes.hidden * sizes.intermediate >= 1 << 31:
        return "an expert's matrix has 2^31 elements or more, where their numbers overflow"
    return None


def refusal(request: Request) -> str | None:
    """Why `dequantize` cannot be served, or None."""
    return limits(request) or selfcheck.verdict(
        "dequant.cuda",
        request.device,
        {"module": cuda.digest(request.device)},
        lambda: check(request),
    )


def prepare(request: Request) -> Callable[[Quantized, Tensor | None, Tensor], None]:
    """See `reap_kernels.dequant.op.dequantize`."""
    from reap_kernels.dequant import kernel_cuda

    return kernel_cuda.dequantize


def check(request: Request) -> str | None:
    """Compares bits with the reference's on the CPU, for every format, and what must stay."""
    where, run = request.device, prepare(request)
    for name, (packed, _, scaled) in FORMATS.items():
        for sizes in _SIZES if packed == 1 else _SIZES[:1]:
            for dtype in scaled:
                made = make_quantized(name, *sizes, scales=dtype)
                want = torch.full(sizes, -7.0, dtype=torch.bfloat16)
                got = want.to(where)
                reference.dequantize(made, None, want)
                want[1] = -7.0
                offsets = torch.tensor([0, 2, 2, 5][: sizes[0] + 1], device=where)
                run(made.to(where), offsets, got)
                if not torch.equal(got.cpu().view(torch.int16), want.view(torch.int16)):
                    return f"other bits than the reference's for {name} of {sizes}, scales {dtype}"
    return None


BACKEND = Backend("dequant", "cuda", priority, refusal, prepare)
