"""cross: what the experts' inner activations have in common with given targets."""

import torch
from torch import Tensor

from reap_kernels.cross import cpu, reference, triton_backend
from reap_kernels.device import without_autocast
from reap_kernels.dispatch import Backend, always, register, select
from reap_kernels.errors import DtypeError, ShapeError
from reap_kernels.experts.op import check_experts
from reap_kernels.experts.request import request_of
from reap_kernels.saliency.op import checked_mask
from reap_kernels.sort.op import check_routing, cpu_only
from reap_kernels.types import FLOATS, ExpertWeights


def cross(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: ExpertWeights,
    targets: Tensor,
    out: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Adds sum g targets[t] h^T of each expert's rows to `out`, in place, computing h on the way.

    With Phi the matrix of all [g_j h_j] of a token, this is R Phi^T of a least-squares problem in
    the down projections, their gradient by a loss whose gradient by the layer's output is
    `targets`. `observe_layer` with other down projections is the product by Phi itself.

    Costs the products of up, and H I multiplications per row: as many as down.

    Args:
        hidden: [T, H] bf16, fp16, fp32 or fp64, the layer's input.
        topk_ids: [T, k] integers; ids outside [0, E) are foreign and add nothing.
        topk_weights: [T, k] float, g; slots of weight exactly 0 add nothing.
        experts: the layer's weights, same dtype and device as `hidden`; down is not read.
        targets: [T, H] float; GPU backends round them to `hidden`'s dtype, as tensor cores take
            one.
        out: [E, H, I] float32, added to.
        mask: [T] bool, tokens that count; others may hold anything in `targets`. Default all.
        backend: explicit backend, never falls back. Default: see `explain()`.

    Raises:
        ShapeError, DtypeError: inputs that do not fit each other; the message names the input.
        BackendUnavailable: no backend serves, or the requested one refuses, with the reason.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> up, down = torch.randn(8, 32, 64), torch.randn(8, 64, 16)
        >>> experts = rk.ExpertWeights(up, down, rk.Activation("silu"))
        >>> hidden, ids = torch.randn(5, 64), torch.tensor([[0, 1]] * 5)
        >>> out = torch.zeros(8, 64, 16)
        >>> rk.cross(hidden, ids, torch.full((5, 2), 0.5), experts, torch.randn(5, 64), out)
        >>> out.flatten(1).any(dim=1)  # of experts 0 and 1
        tensor([ True,  True, False, False, False, False, False, False])
    """
    check_experts(hidden, experts)
    check_routing(topk_ids, topk_weights)
    _check(hidden, topk_ids, experts, targets, out)
    mask = checked_mask(mask, len(hidden))
    request = request_of("cross", hidden, topk_ids.shape[1], experts)
    with torch.no_grad(), without_autocast(hidden.device):
        if mask is not None:  # as slots of weight 0, its rows are not even gathered
            topk_weights = topk_weights.masked_fill(~mask[:, None], 0.0)
        select(request, backend).run(hidden, topk_ids, topk_weights, experts, targets, out)


def _check(
    hidden: Tensor, topk_ids: Tensor, experts: ExpertWeights, targets: Tensor, out: Tensor
) -> None:
    """Raises unless ids, targets and sums fit the layer."""
    if len(topk_ids) != len(hidden):
        raise ShapeError(
            f"topk_ids has {len(topk_ids)} tokens and hidden {len(hidden)}; they must be the same"
        )
    shape = (experts.num_experts, experts.hidden_size, experts.intermediate_size)
    for name, tensor, wanted in (("targets", targets, hidden.shape), ("out", out, shape)):
        if tensor.shape != wanted:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(wanted)}")
        if tensor.device != hidden.device:
            raise DtypeError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move one")
    if targets.dtype not in FLOATS or out.dtype != torch.float32:
        raise DtypeError(
            f"targets is {targets.dtype} and out {out.dtype}; targets must be bf16, fp16, fp32 or "
            "fp64, out float32"
        )


register(Backend("cross", "reference", lambda _: 0, lambda _: None, always(reference.cross)))
register(Backend("cross", "cpu", lambda _: 10, cpu_only, always(cpu.cross)))
register(triton_backend.BACKEND)
