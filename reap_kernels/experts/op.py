"""expert_outputs: f_j(x) of every routed row, before the router weight."""

from torch import Tensor

from reap_kernels.dispatch import Backend, always, register, select
from reap_kernels.errors import DtypeError, ShapeError
from reap_kernels.experts import cpu, reference, triton_backend
from reap_kernels.experts.request import request_of
from reap_kernels.sort.op import cpu_only
from reap_kernels.types import FLOATS, ExpertWeights, Routing


def expert_outputs(
    hidden: Tensor, routing: Routing, experts: ExpertWeights, *, backend: str | None = None
) -> Tensor:
    """Outputs of the routed rows, sorted by expert, before the router weight.

    Args:
        hidden: [T, H] float, the layer's input.
        routing: from `sort_by_expert`.
        experts: the layer's weights, same dtype and device as `hidden`.
        backend: explicit backend, never falls back.

    Returns:
        [S, H] in the backend's compute dtype (float64 for `reference`); rows past `offsets[E]`,
        which no expert here serves, are zero.

    Raises:
        ShapeError, DtypeError: inputs that do not fit each other.
        BackendUnavailable: no backend serves, or the requested one refuses.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> up, down = torch.randn(8, 32, 64), torch.randn(8, 64, 16)
        >>> experts = rk.ExpertWeights(up, down, rk.Activation("silu"))
        >>> routing = rk.sort_by_expert(torch.randint(0, 8, (5, 2)), 8)
        >>> rk.expert_outputs(torch.randn(5, 64), routing, experts).shape
        torch.Size([10, 64])
    """
    check_experts(hidden, experts)
    request = request_of("experts", hidden, routing.top_k, experts)
    y: Tensor = select(request, backend).run(hidden, routing, experts)
    return y


def check_experts(hidden: Tensor, experts: ExpertWeights) -> None:
    """Raises unless `hidden` is [T, H] of the experts' dtype and device."""
    if hidden.ndim != 2 or hidden.shape[1] != experts.hidden_size:
        raise ShapeError(
            f"hidden has shape {tuple(hidden.shape)}; these experts take [T, {experts.hidden_size}]"
        )
    if hidden.dtype not in FLOATS or hidden.dtype != experts.dtype:
        raise DtypeError(
            f"hidden is {hidden.dtype} and the experts are {experts.dtype}; both must be the same "
            "of bf16, fp16, fp32, fp64"
        )
    if hidden.device != experts.device:
        raise DtypeError(f"hidden is on {hidden.device}, the experts on {experts.device}; move one")


register(
    Backend("experts", "reference", lambda _: 0, lambda _: None, always(reference.expert_outputs))
)
register(Backend("experts", "cpu", lambda _: 10, cpu_only, always(cpu.expert_outputs)))
register(triton_backend.BACKEND)
