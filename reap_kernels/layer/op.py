"""observe_layer: one MoE layer's output and its experts' statistics, as a torch custom op."""

import math

import torch
from torch import Tensor

from reap_kernels.dispatch import Backend, Request, register, select
from reap_kernels.errors import ShapeError
from reap_kernels.experts.op import check_experts
from reap_kernels.gates import GateFormula
from reap_kernels.layer import cpu, reference
from reap_kernels.route.op import check_routing, cpu_only
from reap_kernels.saliency.op import check_mask, group_ids
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
    backend: str | None = None,
) -> Tensor:
    """The routed part of an MoE layer, and what REAP needs to know of it, in one pass.

    out[t] = sum over slots s of g[t, s] * f_j(hidden[t]) with j = topk_ids[t, s], and, for each
    (group, expert), the sums of `LayerStats` (REAP, arXiv 2510.13999, eq. 9, is gate_norm_sum /
    count). Inference only: no gradient flows.

    Args:
        hidden: [T, H] bf16, fp16, fp32 or fp64.
        topk_ids: [T, k] integers as the model's router made them. Ids outside [0, E) are foreign
            (expert-parallel sentinels, identity experts): they add nothing and are not counted.
        topk_weights: [T, k] float gate weights; slots of weight exactly 0 are not counted.
        experts: the layer's weights, same dtype and device as `hidden`.
        stats: statistics to add to in place, on the same device; None for the plain forward.
        mask: [T] bool, tokens that count; the others are computed but not counted. Default all.
        group: calibration group of the batch, or [T] integers.
        backend: explicit backend, never falls back. Default: see `explain()`.

    Returns:
        [T, H] in `hidden`'s dtype.

    Raises:
        ShapeError, DtypeError: inputs that do not fit each other; the message names the input.
        BackendUnavailable: no backend serves, or the requested one refuses, with the reason.
    """
    check_experts(hidden, experts)
    check_routing(topk_ids, topk_weights)
    if len(topk_ids) != len(hidden):
        raise ShapeError(
            f"topk_ids has {len(topk_ids)} tokens and hidden {len(hidden)}; they must be the same"
        )
    check_mask("mask", mask, len(hidden))
    groups = None
    if stats is not None:
        if stats.num_experts != experts.num_experts or stats.device != hidden.device:
            raise ShapeError(
                f"stats hold {stats.num_experts} experts on {stats.device}; the layer has "
                f"{experts.num_experts} on {hidden.device}"
            )
        groups = group_ids(group, len(hidden), stats)
    formula = experts.formula
    if formula.fn is not None:
        # A torch function cannot pass through an operator schema, so it runs as plain torch code.
        return _run(hidden, topk_ids, topk_weights, experts, stats, mask, groups, backend)
    out: Tensor = torch.ops.reap_kernels.observe_layer(
        hidden,
        topk_ids,
        topk_weights,
        _flat(experts.up),
        _flat(experts.gate),
        _flat(experts.down),
        experts.up_bias,
        experts.gate_bias,
        experts.down_bias,
        formula.kind,
        formula.limit if math.isfinite(formula.limit) else None,
        formula.alpha,
        experts.interleaved,
        [] if stats is None else stats.packed(),
        mask,
        groups,
        backend,
    )
    return out


def _run(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: ExpertWeights,
    stats: LayerStats | None,
    mask: Tensor | None,
    groups: Tensor | None,
    backend: str | None,
) -> Tensor:
    request = Request("layer", hidden.device, hidden.dtype, experts.formula.kind)
    with torch.no_grad():
        out: Tensor = select(request, backend).run(
            hidden, topk_ids, topk_weights, experts, stats, mask, groups
        )
    return out


def _flat(matrices: Matrices | None) -> list[Tensor]:
    """As an operator takes them: one stacked tensor, or one an expert; empty for none."""
    if matrices is None:
        return []
    return [matrices] if isinstance(matrices, Tensor) else list(matrices)


def _matrices(flat: list[Tensor]) -> Matrices:
    return flat[0] if len(flat) == 1 and flat[0].ndim == 3 else flat


@torch.library.custom_op("reap_kernels::observe_layer", mutates_args=("stats",))
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
    groups: Tensor | None,
    backend: str | None,
) -> Tensor:
    experts = ExpertWeights(
        _matrices(up),
        _matrices(down),
        GateFormula(kind, math.inf if limit is None else limit, alpha),
        _matrices(gate) if gate else None,
        up_bias,
        gate_bias,
        down_bias,
        interleaved,
    )
    layer = LayerStats.from_packed(stats) if stats else None
    return _run(hidden, topk_ids, topk_weights, experts, layer, mask, groups, backend)


@_observe_layer.register_fake
def _(hidden: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden)


register(Backend("layer", "reference", 0, lambda request: None, reference.observe_layer))
register(Backend("layer", "cpu", 10, cpu_only, cpu.observe_layer))
