"""sort_by_expert: (token, slot) rows sorted by expert."""

import torch
from torch import Tensor

from reap_kernels.dispatch import Backend, Request, Sizes, always, register, select
from reap_kernels.errors import DtypeError, ShapeError
from reap_kernels.sort import cpu, cuda_backend, reference, triton_backend
from reap_kernels.types import Routing


def sort_by_expert(
    topk_ids: Tensor,
    num_experts: int,
    *,
    topk_weights: Tensor | None = None,
    backend: str | None = None,
) -> Routing:
    """Sorts the routed rows of a batch by expert, stably.

    Args:
        topk_ids: [T, k] integers; ids outside [0, E) are foreign.
        num_experts: E.
        topk_weights: [T, k]; slots whose weight is exactly 0 are treated as foreign.
        backend: explicit backend, never falls back.

    Returns:
        A `Routing` of S = T * k rows.

    Raises:
        ShapeError, DtypeError: malformed ids or weights.
        BackendUnavailable: no backend serves, or the requested one refuses.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> routing = rk.sort_by_expert(torch.tensor([[1, 0], [1, 2]]), 3)
        >>> routing.gather_index  # slots by expert: 1 of expert 0, 0 and 2 of 1, 3 of 2
        tensor([1, 0, 2, 3])
        >>> routing.offsets
        tensor([0, 1, 3, 4])
    """
    check_routing(topk_ids, topk_weights)
    tokens, top_k = topk_ids.shape
    sizes = Sizes(tokens, top_k, num_experts)
    request = Request("sort", topk_ids.device, topk_ids.dtype, sizes=sizes)
    routing: Routing = select(request, backend).run(topk_ids, topk_weights, num_experts)
    return routing


def check_routing(topk_ids: Tensor, topk_weights: Tensor | None) -> None:
    """Raises ShapeError or DtypeError unless ids are [T, k] integers and weights [T, k] floats."""
    if topk_ids.ndim != 2 or topk_ids.shape[1] < 1:
        raise ShapeError(f"topk_ids has shape {tuple(topk_ids.shape)}; expected [T, k] with k >= 1")
    if topk_ids.dtype.is_floating_point or topk_ids.dtype in (torch.bool, torch.complex64):
        raise DtypeError(f"topk_ids is {topk_ids.dtype}; expected an integer dtype")
    if topk_weights is None:
        return
    if topk_weights.shape != topk_ids.shape:
        raise ShapeError(
            f"topk_weights has shape {tuple(topk_weights.shape)}; it must equal topk_ids' "
            f"{tuple(topk_ids.shape)}"
        )
    if not topk_weights.dtype.is_floating_point:
        raise DtypeError(f"topk_weights is {topk_weights.dtype}; expected a float dtype")


def cpu_only(request: Request) -> str | None:
    """The reason a CPU backend refuses: inputs that lie elsewhere."""
    return None if request.device.type == "cpu" else f"inputs are on {request.device}, not the CPU"


register(
    Backend("sort", "reference", lambda _: 0, lambda _: None, always(reference.sort_by_expert))
)
register(Backend("sort", "cpu", lambda _: 10, cpu_only, always(cpu.sort_by_expert)))
register(triton_backend.BACKEND)
register(cuda_backend.BACKEND)
