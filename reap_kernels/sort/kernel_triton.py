"""Triton kernels: a stable counting sort of slots by expert, and the tiles that follow.

Arrays. S = T * k slots; E experts, and bin E for foreign slots (id outside [0, E), weight 0).

    ids            [S] any integer    expert of each slot
    weights        [S] any float      router weight of each slot; exactly 0 makes it foreign
    counts         [NB, E + 1] int32  slots of each bin in each block of BLOCK slots, then their
                                      exclusive sums over the blocks before
    totals         [E + 1] int32      slots of each bin
    offsets        [E + 1] int64      first sorted row of each expert; offsets[E] rows are served
    gather_index   [S] int64          slot of each sorted row
    scatter_index  [S] int64          sorted row of each slot
    experts        [M] int32          expert of each tile: BLOCK_M sorted rows, or the last few, of
                                      one expert
    rows           [M] int32          first sorted row of each tile
    firsts         [E + 1] int32      first tile of each expert; firsts[E] tiles are in use

Nothing is atomic on global memory and no order depends on timing: the same ids give the same bits.
Numbers that change from call to call are not specialized, so that a new length compiles nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _bins(ids_ptr, weights_ptr, slots, num_slots, E: tl.constexpr, WEIGHTED: tl.constexpr):
    """Bin of each slot; slots past the end count as foreign."""
    live = slots < num_slots
    ids = tl.load(ids_ptr + slots, mask=live, other=E).to(tl.int64)
    foreign = (ids < 0) | (ids >= E)
    if WEIGHTED:
        foreign = foreign | (tl.load(weights_ptr + slots, mask=live, other=0.0) == 0.0)
    return tl.where(foreign, E, ids).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots"])
def count_bins(
    ids_ptr,
    weights_ptr,
    counts_ptr,
    num_slots,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Grid (NB,): one program counts the bins of one block of slots."""
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    bins = _bins(ids_ptr, weights_ptr, slots, num_slots, E, WEIGHTED)
    found = tl.histogram(bins, BINS)
    e = tl.arange(0, BINS)
    tl.store(counts_ptr + block.to(tl.int64) * (E + 1) + e, found, mask=e <= E)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_blocks(
    counts_ptr,
    totals_ptr,
    num_blocks,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (ceil((E + 1) / BLOCK_E),): exclusive sums over blocks of BLOCK_E bins' counts."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        at = counts_ptr + block.to(tl.int64)[:, None] * (E + 1) + e[None, :]
        mask = (block < num_blocks)[:, None] & (e <= E)[None, :]
        found = tl.load(at, mask=mask, other=0)
        upto = tl.cumsum(found, axis=0)
        tl.store(at, before[None, :] + upto - found, mask=mask)
        before += tl.sum(found, axis=0)
    tl.store(totals_ptr + e, before, mask=e <= E)


@triton.jit
def sum_bins(totals_ptr, offsets_ptr, E: tl.constexpr, BINS: tl.constexpr):
    """Grid (1,): the first sorted row of each bin."""
    e = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + e, mask=e <= E, other=0).to(tl.int64)
    tl.store(offsets_ptr + e, tl.cumsum(totals, axis=0) - totals, mask=e <= E)


@triton.jit(do_not_specialize=["num_slots"])
def place_slots(
    ids_ptr,
    weights_ptr,
    counts_ptr,
    offsets_ptr,
    gather_index_ptr,
    scatter_index_ptr,
    num_slots,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Grid (NB,): one program places one block of slots.

    A slot's row is the first of its bin, plus the bin's slots in earlier blocks, plus its rank
    among equals in its own block. The rank is counted by BLOCK x CHUNK comparisons at a time, which
    needs neither a sort nor shared counters.
    """
    block = tl.program_id(0)
    inside = tl.arange(0, BLOCK)
    slots = block * BLOCK + inside
    bins = _bins(ids_ptr, weights_ptr, slots, num_slots, E, WEIGHTED)
    row = tl.load(offsets_ptr + bins)
    row += tl.load(counts_ptr + block.to(tl.int64) * (E + 1) + bins)
    for start in range(0, BLOCK, CHUNK):
        other = start + tl.arange(0, CHUNK)
        others = _bins(ids_ptr, weights_ptr, block * BLOCK + other, num_slots, E, WEIGHTED)
        equal = (others[None, :] == bins[:, None]) & (other[None, :] < inside[:, None])
        row += tl.sum(equal.to(tl.int32), axis=1)
    live = slots < num_slots
    tl.store(gather_index_ptr + row, slots.to(tl.int64), mask=live)
    tl.store(scatter_index_ptr + slots, row, mask=live)


@triton.jit
def schedule_tiles(
    offsets_ptr,
    experts_ptr,
    rows_ptr,
    firsts_ptr,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (E,): one program lists the tiles of one expert."""
    expert = tl.program_id(0)
    e = tl.arange(0, BINS)
    start = tl.load(offsets_ptr + e, mask=e < E, other=0)
    stop = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles = ((stop - start + BLOCK_M - 1) // BLOCK_M).to(tl.int32)
    before = tl.sum(tl.where(e < expert, tiles, 0), axis=0)
    own = tl.sum(tl.where(e == expert, tiles, 0), axis=0)
    row = tl.load(offsets_ptr + expert).to(tl.int32)
    tl.store(firsts_ptr + expert, before)
    if expert == E - 1:
        tl.store(firsts_ptr + E, before + own)
    for done in range(0, own, CHUNK):
        tile = done + tl.arange(0, CHUNK)
        mine = tile < own
        tl.store(experts_ptr + before + tile, tl.zeros_like(tile) + expert, mask=mine)
        tl.store(rows_ptr + before + tile, row + tile * BLOCK_M, mask=mine)
