"""CPU MoE layer: output, norms and sums while each piece of expert outputs is still in cache.

Nothing of size S x H is ever stored: a piece is measured, scaled by its gates, added to its tokens
and forgotten.
"""

import torch
from torch import Tensor

from reap_kernels.experts.cpu import pieces
from reap_kernels.route import cpu as route_cpu
from reap_kernels.saliency.cpu import RowMeasures, reduce_rows
from reap_kernels.stats import LayerStats
from reap_kernels.types import ExpertWeights


def observe_layer(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: ExpertWeights,
    stats: LayerStats | None,
    mask: Tensor | None,
    group: Tensor | None,
) -> Tensor:
    """See `reap_kernels.layer.op.observe_layer`; `group` is [T] here, given with `stats`."""
    routing = route_cpu.route(topk_ids, topk_weights, experts.num_experts)
    slots = routing.order[: int(routing.offsets[-1])]
    accumulator = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    gates = topk_weights.reshape(-1)[slots].to(accumulator)
    measures = RowMeasures.empty(len(slots), accumulator) if stats is not None else None
    out = torch.zeros_like(hidden, dtype=accumulator)
    for rows, tokens, y in pieces(hidden, routing, experts):
        if measures is not None:
            measures.measure(rows, y)
        out.index_add_(0, tokens, y.to(accumulator).mul_(gates[rows, None]))
    if stats is not None and measures is not None and group is not None:
        tokens = slots // routing.top_k
        key = group[tokens] * stats.num_experts + topk_ids.reshape(-1)[slots]
        reduce_rows(measures, key, gates, None if mask is None else mask[tokens], stats)
        counted = group if mask is None else group[mask]
        stats.tokens.add_(torch.bincount(counted, minlength=stats.num_groups))
    return out.to(hidden.dtype)
