"""observe_layer: one MoE layer's output and its experts' statistics, as a torch custom op."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reap_kernels.activation import Activation
from reap_kernels.device import without_autocast
from reap_kernels.dispatch import Backend, always, direct, register, select
from reap_kernels.errors import ShapeError
from reap_kernels.experts.op import check_experts
from reap_kernels.gram.factors import checked_scale
from reap_kernels.gram.op import check_sums
from reap_kernels.layer import cpu, cuda_backend, reference, triton_backend, wgmma_backend
from reap_kernels.layer.call import LayerCall
from reap_kernels.layer_gram import LayerGram
from reap_kernels.quantized import FORMATS, Quantized
from reap_kernels.saliency.op import checked_mask, group_ids
from reap_kernels.sort.op import check_routing, cpu_only
from reap_kernels.stats import LayerStats
from reap_kernels.types import ExpertWeights, Matrices


def observe_layer(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: ExpertWeights,
    stats: LayerStats | None = None,
    *,
    mask: Tensor | None = None,
    group: int | Tensor = 0,
    chunk: int | None = None,
    gram: LayerGram | None = None,
    gram_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The routed part of an MoE layer, and what REAP needs to know of it, in one pass.

    out[t] = sum over slots s of g[t, s] * f_j(hidden[t]) with j = topk_ids[t, s], and, for each
    (group, expert), the sums of `LayerStats` (REAP, arXiv 2510.13999, eq. 9, is weighted_norm_sum /
    count). Inference only: no gradient flows.

    Args:
        hidden: [T, H] bf16, fp16, fp32 or fp64.
        topk_ids: [T, k] integers as the model's router made them. Ids outside [0, E) are foreign
            (expert-parallel sentinels, identity experts): they add nothing and are not counted.
        topk_weights: [T, k] float router weights; slots of weight exactly 0 are not counted.
        experts: the layer's weights, same dtype and device as `hidden`.
        stats: statistics to add to in place, on the same device; None for the plain forward.
        mask: [T] bool, tokens that count; the others are computed but not counted. Default all.
        group: calibration group of the batch, or [T] integers.
        chunk: tokens computed at a time by backends that keep whole expert outputs (GPUs'); outputs
            keep their bits, sums move by at most about 1e-12 relative. Default: as many as
            `REAP_SCRATCH_BYTES` allows, see `env.py`.
        gram: sums of the experts' inner activations to add to in place, on the same device; see
            `gram`. Nothing else changes by them. Default none.
        gram_scale: factor of 0 or more of all tokens in `gram`, or [T] floats, such as the weight
            of each token's calibration group.
        backend: explicit backend, never falls back. Default: see `explain()`.

    Returns:
        [T, H] in `hidden`'s dtype.

    Raises:
        ShapeError, DtypeError: inputs that do not fit each other; the message names the input.
        DataError: `stats` lack a field.
        BackendUnavailable: no backend serves, or the requested one refuses, with the reason.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> up, down = torch.randn(8, 32, 64), torch.randn(8, 64, 16)
        >>> experts = rk.ExpertWeights(up, down, rk.Activation("silu"))
        >>> hidden, ids = torch.randn(5, 64), torch.tensor([[0, 1]] * 5)
        >>> stats = rk.LayerStats(num_experts=8)
        >>> rk.observe_layer(hidden, ids, torch.full((5, 2), 0.5), experts, stats).shape
        torch.Size([5, 64])
        >>> stats.count
        tensor([[5, 5, 0, 0, 0, 0, 0, 0]])
    """
    call = _checked(
        LayerCall(
            hidden, topk_ids, topk_weights, experts, stats, mask, group, chunk, gram, gram_scale
        )
    )
    # A torch function cannot pass through an operator schema: it always runs as plain torch code.
    if experts.activation.fn is not None or direct(hidden):
        return _run(call, backend)
    out: Tensor = torch.ops.reap_kernels.observe_layer(*_flattened(call, backend))
    return out


def _checked(call: LayerCall) -> LayerCall:
    """The call with mask and groups as kernels read them; raises where inputs do not fit."""
    hidden, experts, stats = call.hidden, call.experts, call.stats
    check_experts(hidden, experts)
    check_routing(call.topk_ids, call.topk_weights)
    tokens = len(hidden)
    if len(call.topk_ids) != tokens:
        raise ShapeError(
            f"topk_ids has {len(call.topk_ids)} tokens and hidden {tokens}; they must be the same"
        )
    mask = checked_mask(call.mask, tokens)
    if call.chunk is not None and call.chunk < 1:
        raise ShapeError(f"chunk is {call.chunk}; give a number of tokens above 0, or None")
    group: int | Tensor = 0
    if stats is not None:
        if stats.num_experts != experts.num_experts or stats.device != hidden.device:
            raise ShapeError(
                f"stats hold {stats.num_experts} experts on {stats.device}; the layer has "
                f"{experts.num_experts} on {hidden.device}"
            )
        stats.check_complete()
        group = group_ids(call.group, tokens, stats)
    if call.gram is not None:
        check_sums(call.gram, experts.num_experts, experts.intermediate_size, hidden.device)
        checked_scale(call.gram_scale, tokens)
    if mask is call.mask and group is call.group:
        return call
    return replace(call, mask=mask, group=group)


def _run(call: LayerCall, backend: str | None) -> Tensor:
    resolved = select(call.request, backend)
    with torch.no_grad(), without_autocast(call.hidden.device):
        out: Tensor = resolved.run(call)
        if call.stats is not None:
            _count_tokens(call.stats, len(call.hidden), call.mask, call.group)
    return out


def _count_tokens(stats: LayerStats, tokens: int, mask: Tensor | None, group: int | Tensor) -> None:
    """Adds the tokens that count to their groups, without waiting for the device."""
    if isinstance(group, Tensor):
        member = group[:, None] == torch.arange(stats.num_groups, device=group.device)
        stats.tokens.add_((member if mask is None else member & mask[:, None]).sum(dim=0))
    else:
        stats.tokens[group].add_(tokens if mask is None else mask.sum())


def _flat(matrices: Matrices | None) -> list[Tensor]:
    """As an operator takes them: one stacked tensor, one per expert, or values and scales; empty
    for none. Values go as bytes: torch's own checks of operators cannot compare 8-bit floats.
    """
    if matrices is None:
        return []
    if isinstance(matrices, Quantized):
        return [matrices.values.view(torch.uint8), matrices.scales]
    return [matrices] if isinstance(matrices, Tensor) else list(matrices)


def _flattened(call: LayerCall, backend: str | None) -> tuple[Any, ...]:
    """A call as the operator takes it; `_observe_layer` puts it together again."""
    experts, activation, group = call.experts, call.experts.activation, call.group
    return (
        call.hidden,
        call.topk_ids,
        call.topk_weights,
        _flat(experts.up),
        _flat(experts.gate),
        _flat(experts.down),
        experts.up_bias,
        experts.gate_bias,
        experts.down_bias,
        activation.kind,
        activation.limit if math.isfinite(activation.limit) else None,
        activation.alpha,
        experts.interleaved,
        [] if call.stats is None else call.stats.packed(),
        call.mask,
        0 if isinstance(group, Tensor) else group,
        group if isinstance(group, Tensor) else None,
        call.chunk,
        [] if call.gram is None else call.gram.packed(),
        1.0 if isinstance(call.gram_scale, Tensor) else call.gram_scale,
        call.gram_scale if isinstance(call.gram_scale, Tensor) else None,
        backend,
        *_format(experts.down),
    )


def _format(matrices: Matrices) -> tuple[str | None, int, int]:
    """Format and block of quantized matrices, all of a layer's alike; no format for others."""
    if isinstance(matrices, Quantized):
        return (matrices.format, *matrices.block)
    return None, 0, 0


def _matrices(flat: list[Tensor], quantized: str | None, block: tuple[int, int]) -> Matrices:
    """What `_flat` and `_format` describe."""
    if quantized is not None:
        return Quantized(flat[0].view(FORMATS[quantized][1]), flat[1], quantized, block)
    return flat[0] if len(flat) == 1 and flat[0].ndim == 3 else flat


@torch.library.custom_op("reap_kernels::observe_layer", mutates_args=("stats", "gram"))
def _observe_layer(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up: list[Tensor],
    gate: list[Tensor],
    down: list[Tensor],
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    kind: str,
    limit: float | None,
    alpha: float,
    interleaved: bool,
    stats: list[Tensor],
    mask: Tensor | None,
    group: int,
    groups: Tensor | None,
    chunk: int | None,
    gram: list[Tensor],
    scale: float,
    scales: Tensor | None,
    backend: str | None,
    quantized: str | None = None,
    block_rows: int = 0,
    block_columns: int = 0,
) -> Tensor:
    stored = (quantized, (block_rows, block_columns))
    experts = ExpertWeights(
        _matrices(up, *stored),
        _matrices(down, *stored),
        Activation(kind, math.inf if limit is None else limit, alpha),
        _matrices(gate, *stored) if gate else None,
        up_bias,
        gate_bias,
        down_bias,
        interleaved,
    )
    layer = LayerStats.from_packed(stats) if stats else None
    own = group if groups is None else groups
    sums = LayerGram.from_packed(gram) if gram else None
    factor = scale if scales is None else scales
    call = LayerCall(hidden, topk_ids, topk_weights, experts, layer, mask, own, chunk, sums, factor)
    return _run(call, backend)


@_observe_layer.register_fake
def _(hidden: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden)


register(
    Backend("layer", "reference", lambda _: 0, lambda _: None, always(reference.observe_layer))
)
register(Backend("layer", "cpu", lambda _: 10, cpu_only, always(cpu.observe_layer)))
for _backend in triton_backend.BACKENDS:
    register(_backend)
register(cuda_backend.BACKEND)
register(wgmma_backend.BACKEND)
