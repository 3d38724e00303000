"""When the `cuda` backend serves `saliency`, and its self-check."""

from collections.abc import Callable
from functools import partial

from reap_kernels import cuda, selfcheck
from reap_kernels.dispatch import Backend, Request
from reap_kernels.saliency.stage_kernels import accumulate, stage_kernels
from reap_kernels.saliency.triton_backend import check
from reap_kernels.sort.cuda_backend import limits, priority


def refusal(request: Request) -> str | None:
    """Why `accumulate` cannot be served, or None."""
    reason = limits(request)
    if reason is None and request.dtype not in cuda.FLOATS:
        reason = f"it reads {', '.join(map(str, cuda.FLOATS))}, not {request.dtype}"
    return reason or selfcheck.verdict(
        "saliency.cuda",
        request.device,
        {"dtype": request.dtype, "module": cuda.digest(request.device)},
        lambda: check(prepare(request), request),
    )


def prepare(request: Request) -> Callable[..., None]:
    """See `reap_kernels.saliency.op.accumulate`."""
    return partial(accumulate, stage_kernels("cuda", "cuda"))


BACKEND = Backend("saliency", "cuda", priority, refusal, prepare)
