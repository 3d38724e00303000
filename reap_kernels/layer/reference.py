"""Reference MoE layer in float64: the composition of the reference ops."""

import torch
from torch import Tensor

from reap_kernels.experts import reference as experts_reference
from reap_kernels.gram import reference as gram_reference
from reap_kernels.layer.call import LayerCall
from reap_kernels.saliency import reference as saliency_reference
from reap_kernels.sort import reference as sort_reference


def observe_layer(call: LayerCall) -> Tensor:
    """See `reap_kernels.layer.op.observe_layer`; always whole, whatever `chunk`."""
    hidden, experts = call.hidden, call.experts
    routing = sort_reference.sort_by_expert(call.topk_ids, call.topk_weights, experts.num_experts)
    y = experts_reference.expert_outputs(hidden, routing, experts)
    served = int(routing.offsets[-1])
    slots = routing.gather_index[:served]
    tokens, y = slots // routing.top_k, y[:served]
    router_weights = call.topk_weights.reshape(-1)[slots].double()
    out = torch.zeros_like(hidden, dtype=torch.float64)
    out.index_add_(0, tokens, router_weights[:, None] * y)
    if call.stats is not None:
        ids = call.topk_ids.reshape(-1)[slots]
        rows_mask = None if call.mask is None else call.mask[tokens]
        own = call.group[tokens] if isinstance(call.group, Tensor) else call.group
        saliency_reference.accumulate(y, ids, router_weights, call.stats, rows_mask, own)
    if call.gram is not None:
        h = experts_reference.inner_outputs(hidden, routing, experts)
        gram_reference.gram(h, routing, call.gram_factors(), call.gram)
    return out.to(hidden.dtype)
