"""CUDA sort by expert: launches of the counting sort and of tile lists in `csrc/sort.cu`."""

import torch
from torch import Tensor

from reap_kernels import cuda
from reap_kernels.sort.slots import SortedSlots, Tiles, empty_tiles
from reap_kernels.types import Routing

_SORT = cuda.Kernel(
    "sort_slots",
    ids=cuda.INTEGERS,
    topk_weights=cuda.FLOATS,
    counts=torch.int32,
    totals=torch.int32,
    offsets=torch.int64,
    gather_index=torch.int64,
    scatter_index=torch.int64,
)
_SCHEDULE = cuda.Kernel(
    "schedule_tiles",
    offsets=torch.int64,
    tile_experts=torch.int32,
    tile_rows=torch.int32,
    firsts=torch.int32,
)


def sort_slots(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int) -> SortedSlots:
    """Sorts slots by expert, stably, without waiting for the device.

    Args:
        topk_ids: [T, k] integers; ids outside [0, E) are foreign.
        topk_weights: [T, k] floats or None; slots of weight exactly 0 are foreign.
        num_experts: E.
    """
    where = topk_ids.device
    ids = topk_ids if topk_ids.dtype in cuda.INTEGERS else topk_ids.to(torch.int64)
    slots, bins = ids.numel(), num_experts + 1
    chunks = -(-slots // cuda.constant(where, "SORT_CHUNK"))

    def empty(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(size, dtype=dtype, device=where)

    offsets, gather_index, scatter_index = empty(bins), empty(slots), empty(slots)
    _SORT(
        where,
        f"T = {len(ids)}, k = {ids.shape[1]}, E = {num_experts}",
        ids=ids.contiguous(),
        topk_weights=None if topk_weights is None else topk_weights.contiguous(),
        slots=slots,
        experts=num_experts,
        counts=empty(chunks, bins, dtype=torch.int32),
        totals=empty(bins, dtype=torch.int32),
        offsets=offsets,
        gather_index=gather_index,
        scatter_index=scatter_index,
    )
    return SortedSlots(gather_index, scatter_index, offsets, ids.shape[1], schedule)


def schedule(offsets: Tensor, slots: int, block_m: int) -> Tiles:
    """Lists tiles of at most `block_m` sorted rows of one expert each."""
    tiles = empty_tiles(offsets, slots, block_m)
    experts = len(offsets) - 1
    _SCHEDULE(
        offsets.device,
        f"S = {slots}, E = {experts}, block_m = {block_m}",
        offsets=offsets,
        experts=experts,
        block_m=block_m,
        tile_experts=tiles.experts,
        tile_rows=tiles.rows,
        firsts=tiles.firsts,
    )
    return tiles


def sort_by_expert(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int) -> Routing:
    """See `reap_kernels.sort.op.sort_by_expert`."""
    found = sort_slots(topk_ids, topk_weights, num_experts)
    return Routing(found.gather_index, found.offsets, found.top_k)
