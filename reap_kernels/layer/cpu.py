"""CPU MoE layer: output, norms and sums while each piece of expert outputs is still in cache.

Nothing of size S x H is ever stored: a piece is measured, scaled by its router weights, added to
its tokens and dropped.
"""

import torch
from torch import Tensor

from reap_kernels.experts.cpu import partition, pieces
from reap_kernels.gram import cpu as gram_cpu
from reap_kernels.layer.call import LayerCall
from reap_kernels.saliency.cpu import RowMeasures, reduce_rows
from reap_kernels.sort import cpu as sort_cpu


def observe_layer(call: LayerCall) -> Tensor:
    """See `reap_kernels.layer.op.observe_layer`; `chunk` is for backends that hold whole calls."""
    hidden, experts, stats = call.hidden, call.experts, call.stats
    routing = sort_cpu.sort_by_expert(call.topk_ids, call.topk_weights, experts.num_experts)
    slots = routing.gather_index[: int(routing.offsets[-1])]
    accumulator = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    router_weights = call.topk_weights.reshape(-1)[slots].to(accumulator)
    parts = partition(routing.offsets)
    columns = router_weights.unsqueeze(1).split([rows for _, rows in parts])
    measures: list[RowMeasures] = []
    add = None
    if call.gram is not None:
        add = gram_cpu.adder(call.gram, routing, call.gram_factors(), parts)
    out = torch.zeros_like(hidden, dtype=accumulator)
    found = pieces(hidden, routing, experts, parts, seen=add)
    for column, (rows, y) in zip(columns, found, strict=True):
        if stats is not None:
            measures.append(RowMeasures.of(y))
        wide = y if y.dtype == accumulator else y.to(accumulator)
        out.index_add_(0, rows, wide.mul_(column))
    if stats is not None:
        tokens = slots // routing.top_k
        own = call.group[tokens] if isinstance(call.group, Tensor) else call.group
        key = own * stats.num_experts + call.topk_ids.reshape(-1)[slots].to(torch.int64)
        counted = None if call.mask is None else call.mask[tokens]
        reduce_rows(RowMeasures.joined(measures), key, router_weights, counted, stats)
    return out.to(hidden.dtype)
