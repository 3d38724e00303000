"""GPU MoE layer: route, two grouped products, one pass that combines and measures, one reduction;
each by kernels of whatever kind serves it.

Scratch beside input and output: h [S, I] and y [S, H] (grouped_mm: gathered rows and both halves
too), and O(S). Where that is more than the budget the call is computed in parts of equal tokens,
which launch as the whole would: outputs keep their bits, sums move by at most 1e-12 relative.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels import device, env
from reap_kernels.experts.gpu import grouped_outputs, launches_of, triton_outputs
from reap_kernels.route import gpu as route_gpu
from reap_kernels.route import kernel_cuda as route_cuda
from reap_kernels.route.slots import SortedSlots
from reap_kernels.saliency import gpu as saliency_gpu
from reap_kernels.saliency import kernel_cuda as saliency_cuda
from reap_kernels.saliency.stages import SlotMeasures, Stages
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
SORTS = {"triton": route_gpu.sort_slots, "cuda": route_cuda.sort_slots}


def stages(route: str, saliency: str) -> Stages:
    """The stages around the products: routing and saliency by `triton` or `cuda`."""
    if saliency == "triton":
        own = (saliency_gpu.combine, saliency_gpu.reduce_slots, device.written_dtype)
    else:
        own = (saliency_cuda.combine, saliency_cuda.reduce_slots, lambda dtype: dtype)
    return Stages(SORTS[route], *own)


# Scratch below this is not worth asking how much memory is free.
_SMALL = 64 << 20
# O(S) arrays: order, inverse, counts, measures, partial sums and tile lists.
_SLOT_BYTES = 64
# Calls of one shape are split alike for as long as the process lives: same bits, and no question
# to the driver within a captured graph.
_SPLITS: dict[tuple[torch.device, int, int], int] = {}


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
    size = chunk or fitting_tokens(tokens, top_k * slot_bytes, hidden.device)
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


def fitting_tokens(tokens: int, token_bytes: int, where: torch.device) -> int:
    """Tokens computed at a time, at least one: all where their scratch fits the budget.

    The budget is `REAP_SCRATCH_BYTES`, by default a quarter of the memory that is free when a call
    of this size is first made: free to the driver, or held by torch's allocator unused.
    """
    needed = tokens * token_bytes
    budget = env.scratch_bytes()
    if budget is None:
        if needed <= _SMALL or where.type != "cuda":
            return max(tokens, 1)
        key = (where, tokens, token_bytes)
        if key not in _SPLITS:
            free, _ = torch.cuda.mem_get_info(where)
            free += torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
            _SPLITS[key] = _part(tokens, token_bytes, free // 4)
        return _SPLITS[key]
    return _part(tokens, token_bytes, budget)


def _part(tokens: int, token_bytes: int, budget: int) -> int:
    """Tokens of one of the fewest equal parts that each fit `budget`."""
    most = max(1, budget // token_bytes)
    parts = max(1, -(-tokens // most))
    return max(1, -(-tokens // parts))
