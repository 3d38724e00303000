"""Triton sort by expert: launches of the counting sort and of tile lists."""

import torch
from torch import Tensor

from reap_kernels import device
from reap_kernels.sort import kernel_triton as kernels
from reap_kernels.sort.slots import SortedSlots, Tiles, empty_tiles
from reap_kernels.types import Routing

# Slots of one program. 512 keeps the counts, (E + 1) * S / 512 int32, below 8 bytes per slot up to
# E = 1024, and the comparisons of a block below the cost of reading it.
_BLOCK = 512
_CHUNK = 8
# Bins below this give histograms fewer bins than threads, which some Triton versions reject.
_FEWEST_BINS = 128


def sort_slots(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int) -> SortedSlots:
    """Sorts slots by expert, stably, without waiting for the device.

    Args:
        topk_ids: [T, k] integers; ids outside [0, E) are foreign.
        topk_weights: [T, k] or None; slots of weight exactly 0 are foreign.
        num_experts: E.
    """
    ids = topk_ids.contiguous()
    weights = ids if topk_weights is None else topk_weights.contiguous()
    slots, bins = ids.numel(), num_experts + 1
    blocks = -(-slots // _BLOCK)
    wide = max(_FEWEST_BINS, _power_of_two(bins))
    counts, totals = (ids.new_empty(size, dtype=torch.int32) for size in ((blocks, bins), (bins,)))
    offsets, gather_index, scatter_index = (
        ids.new_empty(size, dtype=torch.int64) for size in (bins, slots, slots)
    )
    options = {"E": num_experts, "BLOCK": _BLOCK, "WEIGHTED": topk_weights is not None}
    options |= device.OPTIONS
    with device.on(ids.device):
        if blocks:
            kernels.count_bins[(blocks,)](ids, weights, counts, slots, BINS=wide, **options)
        kernels.scan_blocks[(-(-bins // 16),)](
            counts, totals, blocks, E=num_experts, BLOCK_E=16, CHUNK=64, **device.OPTIONS
        )
        kernels.sum_bins[(1,)](totals, offsets, E=num_experts, BINS=wide, **device.OPTIONS)
        if blocks:
            kernels.place_slots[(blocks,)](
                ids,
                weights,
                counts,
                offsets,
                gather_index,
                scatter_index,
                slots,
                CHUNK=_CHUNK,
                **options,
            )
    return SortedSlots(gather_index, scatter_index, offsets, topk_ids.shape[1], schedule)


def sort_by_expert(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int) -> Routing:
    """See `reap_kernels.sort.op.sort_by_expert`."""
    found = sort_slots(topk_ids, topk_weights, num_experts)
    return Routing(found.gather_index, found.offsets, found.top_k)


def schedule(offsets: Tensor, slots: int, block_m: int) -> Tiles:
    """Lists tiles of at most `block_m` sorted rows of one expert each."""
    num_experts = len(offsets) - 1
    tiles = empty_tiles(offsets, slots, block_m)
    with device.on(offsets.device):
        kernels.schedule_tiles[(num_experts,)](
            offsets,
            tiles.experts,
            tiles.rows,
            tiles.firsts,
            E=num_experts,
            BINS=_power_of_two(num_experts),
            BLOCK_M=block_m,
            CHUNK=64,
            **device.OPTIONS,
        )
    return tiles


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
