"""GPU MoE layer: route, two grouped products, one pass that combines and measures, one reduction;
each by kernels of whatever kind serves it.

Scratch beside input and output: h [S, I] and y [S, H] (grouped_mm: gathered rows and both halves
too), O(S), and for quantised experts one product's bf16 matrices of as many as fit. Where that is
more than the budget the call is computed in parts of equal tokens, which launch as the whole would:
outputs keep their bits, sums move by at most 1e-12 relative.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels.experts.gpu import grouped_outputs, launches_of, triton_outputs
from reap_kernels.route.slots import SortedSlots
from reap_kernels.saliency.stages import SlotMeasures, Stages
from reap_kernels.scratch import fitting
from reap_kernels.stats import LayerStats
from reap_kernels.tuning import Launches
from reap_kernels.types import ExpertWeights


@dataclass(frozen=True)
class Products:
    """One way to compute a layer's expert outputs.

    Attributes:
        outputs: (hidden, rows, experts, launches) -> [S, H] by sorted row.
        width: elements of scratch a slot, all held at once.
    """

    outputs: Callable[[Tensor, SortedSlots, ExpertWeights, Launches], Tensor]
    width: Callable[[ExpertWeights], int]


def _triton_width(experts: ExpertWeights) -> int:
    own = 2 * experts.intermediate_size if experts.formula.kind == "opaque" else 0
    return experts.hidden_size + experts.intermediate_size + own


TRITON = Products(triton_outputs, _triton_width)
GROUPED_MM = Products(
    grouped_outputs, lambda experts: 2 * experts.hidden_size + 3 * experts.intermediate_size
)
PRODUCTS = {"triton": TRITON, "grouped_mm": GROUPED_MM}

# O(S) arrays: order, inverse, counts, measures, partial sums and tile lists.
_SLOT_BYTES = 64


def observe_layer(
    products: Products,
    around: Stages,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: ExpertWeights,
    stats: LayerStats | None,
    mask: Tensor | None,
    group: int | Tensor,
    chunk: int | None,
    launches: Launches | None = None,
) -> Tensor:
    """See `reap_kernels.layer.op.observe_layer`; the expert outputs come from `products`, what is
    done with them from `around`, and `launches` from the table where a self-check or a search gives
    none.
    """
    tokens, top_k = topk_ids.shape
    launches = launches or launches_of(hidden, experts, top_k)
    slot_bytes = products.width(experts) * hidden.element_size() + _SLOT_BYTES
    # The last quarter of the budget is for experts that are dequantised by chunks.
    quarters = 3 if experts.layout == "quantised" else 4
    size = chunk or fitting(tokens, top_k * slot_bytes, hidden.device, quarters)
    dtype = around.written(hidden.dtype)
    out = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        gates = topk_weights[part].contiguous()
        rows = around.sort(topk_ids[part], gates, experts.num_experts)
        y = products.outputs(hidden[part], rows, experts, launches)
        measures = None if stats is None else SlotMeasures.empty(gates.numel(), hidden.device)
        around.combine(y, gates, rows, out[part], measures)
        if stats is not None and measures is not None:
            counted = None if mask is None else mask[part]
            own = group[part] if isinstance(group, Tensor) else group
            around.reduce(measures, gates, rows, stats, counted, own, launches.down.block_m)
    return out.to(hidden.dtype)
