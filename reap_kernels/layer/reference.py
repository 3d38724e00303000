"""Reference MoE layer in float64: the composition of the reference ops."""

import torch
from torch import Tensor

from reap_kernels.experts import reference as experts_reference
from reap_kernels.route import reference as route_reference
from reap_kernels.saliency import reference as saliency_reference
from reap_kernels.stats import LayerStats
from reap_kernels.types import ExpertWeights


def observe_layer(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: ExpertWeights,
    stats: LayerStats | None,
    mask: Tensor | None,
    group: int | Tensor,
    chunk: int | None,
) -> Tensor:
    """See `reap_kernels.layer.op.observe_layer`; always whole, whatever `chunk`."""
    routing = route_reference.route(topk_ids, topk_weights, experts.num_experts)
    y = experts_reference.expert_outputs(hidden, routing, experts)
    served = int(routing.offsets[-1])
    slots = routing.order[:served]
    tokens, y = slots // routing.top_k, y[:served]
    gates = topk_weights.reshape(-1)[slots].double()
    out = torch.zeros_like(hidden, dtype=torch.float64)
    out.index_add_(0, tokens, gates[:, None] * y)
    if stats is not None:
        ids = topk_ids.reshape(-1)[slots]
        rows_mask = None if mask is None else mask[tokens]
        own = group[tokens] if isinstance(group, Tensor) else group
        saliency_reference.accumulate(y, ids, gates, stats, rows_mask, own)
    return out.to(hidden.dtype)
