"""When the `cuda` backend serves `sort`, and its self-check."""

from reap_kernels import cuda, selfcheck, tuning
from reap_kernels.dispatch import Backend, Request
from reap_kernels.sort.triton_backend import Sort, check


def priority(request: Request) -> int:
    """Before Triton on a GPU, unless a launch table says otherwise; last of the fast ones where
    kernels run as built for tests.
    """
    if request.device.type != "cuda":
        return 3
    if cuda.refusal(request.device) is not None:
        return 1
    sizes = request.sizes
    path = tuning.choose_backend(
        request.device, request.op, request.dtype, sizes.intermediate, sizes.rows
    )
    return 30 if path == "cuda" else 10


def limits(request: Request) -> str | None:
    """Why CUDA kernels cannot serve a request, as far as is known without running anything."""
    reason = cuda.refusal(request.device)
    if reason is not None:
        return reason
    sizes = request.sizes
    most = cuda.constant(request.device, "SORT_EXPERTS")
    if sizes.experts > most:
        return f"{sizes.experts} experts are more than it counts, {most}; `triton` has no limit"
    if sizes.tokens * sizes.top_k >= 1 << 31:
        return "tokens * top_k reaches 2^31, where row numbers overflow; pass fewer tokens at once"
    return None


def refusal(request: Request) -> str | None:
    """Why `sort` cannot be served, or None."""
    return limits(request) or selfcheck.verdict(
        "sort.cuda",
        request.device,
        {"module": cuda.digest(request.device)},
        lambda: check(prepare(request), request.device),
    )


def prepare(request: Request) -> Sort:
    """See `reap_kernels.sort.op.sort_by_expert`."""
    from reap_kernels.sort import kernel_cuda

    return kernel_cuda.sort_by_expert


BACKEND = Backend("sort", "cuda", priority, refusal, prepare)
