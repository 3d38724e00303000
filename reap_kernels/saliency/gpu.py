"""Triton saliency: launches of the combination with norms, and of the reduction into statistics."""

import torch
from torch import Tensor

from reap_kernels import device
from reap_kernels.saliency import kernel_triton as kernels
from reap_kernels.saliency.measures import FIELDS, SlotMeasures
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.stats import LayerStats

# Loads of 16 bytes that a thread of the combination has in flight: at k = 8, one of every row.
_LOADS = 8


def combine(
    y: Tensor,
    router_weights: Tensor,
    rows: SortedSlots | None,
    out: Tensor | None,
    measures: SlotMeasures | None,
) -> None:
    """See `saliency.measures.StageKernels.combine`."""
    tokens, top_k = router_weights.shape
    if not tokens:
        return
    slots = 1 << (top_k - 1).bit_length()
    vector = 16 // y.element_size()
    if y.shape[1] % vector:  # rows that begin anywhere are loaded element by element
        vector = 1
    # One token fills a warp; an interpreter pays by the program, not by the element.
    together = 64 if device.interpreted() else 1
    # Stand-ins for what a launch does not use are never read or written.
    unused = SlotMeasures(y, y, y)
    into = measures or unused
    with device.on(y.device):
        kernels.combine_rows[(-(-tokens // together),)](
            y,
            router_weights,
            router_weights if rows is None else rows.scatter_index,
            router_weights if rows is None else rows.offsets,
            y if out is None else out,
            into.norm,
            into.high,
            into.low,
            tokens,
            0 if rows is None else rows.num_experts,
            y.shape[1],
            TOP_K=top_k,
            TOKENS=together,
            SLOTS=slots,
            BLOCK_H=max(32 * _LOADS * vector // slots, vector),
            VECTOR=vector,
            SORTED=rows is not None,
            COMBINE=out is not None,
            OBSERVE=measures is not None,
            num_warps=1,
            **device.OPTIONS,
        )


def reduce_slots(
    measures: SlotMeasures,
    router_weights: Tensor,
    rows: SortedSlots,
    stats: LayerStats,
    mask: Tensor | None,
    group: int | Tensor,
    tile: int,
) -> None:
    """See `saliency.measures.StageKernels.reduce`; an existing tile list costs nothing."""
    tiles = rows.tiles(tile)
    if not tiles.bound:
        return
    grouped = isinstance(group, Tensor)
    groups = stats.num_groups if isinstance(group, Tensor) else 1
    where = router_weights.device
    partials = torch.empty(FIELDS, groups, tiles.bound, dtype=torch.float64, device=where)
    with device.on(where):
        kernels.sum_tiles[(tiles.bound, groups)](
            measures.norm,
            measures.high,
            measures.low,
            router_weights,
            rows.gather_index,
            rows.offsets,
            *tiles.tensors,
            router_weights if mask is None else mask,
            group if isinstance(group, Tensor) else router_weights,
            partials,
            tiles.bound,
            rows.num_experts,
            TOP_K=rows.top_k,
            MASKED=mask is not None,
            GROUPED=grouped,
            BLOCK_M=tile,
            **device.OPTIONS,
        )
        kernels.add_partials[(rows.num_experts, groups)](
            partials,
            tiles.firsts,
            stats.counts,
            stats.sums,
            stats.extrema,
            tiles.bound,
            stats.num_groups,
            0 if isinstance(group, Tensor) else group,
            E=rows.num_experts,
            BLOCK=64,
            num_warps=1,
            **device.OPTIONS,
        )
