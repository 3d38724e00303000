"""Triton kernels of saliency: combine with norms in one read of y, then a fixed-tree reduction.

Arrays, with S = T * k slots (see `sort.kernel_triton` for the indices, offsets and tiles):

    y               [S, H]       expert outputs before the router weight, by sorted row (SORTED) or
                                 by slot
    router_weights  [S]          by slot
    out             [T, H]       sum over a token's slots of router weight * y
    norm            [S] float32  ||y|| by slot; high and low: its largest and smallest element
    partials        [9, G, M]    float64, one tile's sorted rows of one group reduced to the fields
                                 of `LayerStats`: 2 counts, 5 sums, 2 extrema

The combination has to read y once anyway, so the norms cost no extra bytes; they are norms of the
rounded outputs, as models have them. Sums follow fixed trees in float64: the same bits run to run.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def combine_rows(
    y_ptr,
    router_weights_ptr,
    scatter_index_ptr,
    offsets_ptr,
    out_ptr,
    norm_ptr,
    high_ptr,
    low_ptr,
    T,
    E,
    H,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    VECTOR: tl.constexpr,
    SORTED: tl.constexpr,
    COMBINE: tl.constexpr,
    OBSERVE: tl.constexpr,
):
    """Grid (ceil(T / TOKENS),): one program reads the rows of its tokens once.

    SLOTS is TOP_K rounded up. A thread loads VECTOR elements, 16 bytes, of every slot of a block:
    it sums over slots, and squares over its own elements, without exchanging anything. Threads
    exchange their squares and extrema once, after the loop.
    """
    LANES: tl.constexpr = BLOCK_H // VECTOR
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)
    slots = token[:, None] * TOP_K + slot[None, :]
    live = (slot < TOP_K)[None, :] & (token < T)[:, None]
    rows = slots
    if SORTED:
        rows = tl.load(scatter_index_ptr + slots, mask=live, other=0)
        live = live & (rows < tl.load(offsets_ptr + E))
    weight = tl.load(router_weights_ptr + slots, mask=live, other=0.0).to(tl.float32)
    if OBSERVE:
        square = tl.zeros((TOKENS, SLOTS, LANES), dtype=tl.float32)
        high = tl.full((TOKENS, SLOTS, LANES), float("-inf"), dtype=tl.float32)
        low = tl.full((TOKENS, SLOTS, LANES), float("inf"), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        within = live[:, :, None] & (cols < H)[None, None, :]
        y = tl.load(y_ptr + rows[:, :, None] * H + cols[None, None, :], mask=within, other=0.0)
        y = y.to(tl.float32)
        if COMBINE:
            total = tl.sum(weight[:, :, None] * y, axis=1).to(out_ptr.dtype.element_ty)
            at = out_ptr + token[:, None] * H + cols[None, :]
            tl.store(at, total, mask=(token < T)[:, None] & (cols < H)[None, :])
        if OBSERVE:
            own = tl.reshape(y * y, (TOKENS, SLOTS, LANES, VECTOR))
            square += tl.sum(own, axis=3)
            own = tl.where(within, y, float("-inf"))
            high = tl.maximum(high, tl.max(tl.reshape(own, (TOKENS, SLOTS, LANES, VECTOR)), axis=3))
            own = tl.where(within, y, float("inf"))
            low = tl.minimum(low, tl.min(tl.reshape(own, (TOKENS, SLOTS, LANES, VECTOR)), axis=3))
    if OBSERVE:
        tl.store(norm_ptr + slots, tl.sqrt_rn(tl.sum(square, axis=2)), mask=live)
        tl.store(high_ptr + slots, tl.max(high, axis=2), mask=live)
        tl.store(low_ptr + slots, tl.min(low, axis=2), mask=live)


@triton.jit(do_not_specialize=["max_tiles"])
def sum_tiles(
    norm_ptr,
    high_ptr,
    low_ptr,
    router_weights_ptr,
    gather_index_ptr,
    offsets_ptr,
    tile_experts_ptr,
    tile_rows_ptr,
    firsts_ptr,
    mask_ptr,
    group_ptr,
    partials_ptr,
    max_tiles,
    E,
    TOP_K: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid (bound on tiles, groups): the nine sums of one tile's rows that belong to one group."""
    tile, which = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(firsts_ptr + E):
        return
    expert = tl.load(tile_experts_ptr + tile)
    rows = tl.load(tile_rows_ptr + tile) + tl.arange(0, BLOCK_M)
    counted = rows < tl.load(offsets_ptr + expert + 1)
    slots = tl.load(gather_index_ptr + rows, mask=counted, other=0)
    if MASKED:
        counted = counted & (tl.load(mask_ptr + slots // TOP_K, mask=counted, other=0) != 0)
    if GROUPED:
        counted = counted & (tl.load(group_ptr + slots // TOP_K, mask=counted, other=-1) == which)
    norm = tl.load(norm_ptr + slots, mask=counted, other=0.0)
    # NaN and Inf both fail this; such rows enter `nonfinite` and no sum.
    finite = tl.abs(norm) < float("inf")
    whole = counted & finite
    norm = tl.where(whole, norm, 0.0).to(tl.float64)
    weight = tl.load(router_weights_ptr + slots, mask=whole, other=0.0).to(tl.float64)
    weighted = weight * norm
    high = tl.load(high_ptr + slots, mask=whole, other=float("-inf")).to(tl.float64)
    low = tl.load(low_ptr + slots, mask=whole, other=float("inf")).to(tl.float64)
    step = tl.num_programs(1).to(tl.int64) * max_tiles
    at = partials_ptr + which.to(tl.int64) * max_tiles + tile
    tl.store(at, tl.sum(whole.to(tl.float64), axis=0))
    tl.store(at + step, tl.sum((counted & (finite == 0)).to(tl.float64), axis=0))
    tl.store(at + 2 * step, tl.sum(weight, axis=0))
    tl.store(at + 3 * step, tl.sum(norm, axis=0))
    tl.store(at + 4 * step, tl.sum(weighted, axis=0))
    tl.store(at + 5 * step, tl.sum(norm * norm, axis=0))
    tl.store(at + 6 * step, tl.sum(weighted * weighted, axis=0))
    tl.store(at + 7 * step, tl.max(high, axis=0))
    tl.store(at + 8 * step, tl.min(low, axis=0))


@triton.jit
def _whole(base, first, stop, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Sum, maximum or minimum of base[first:stop] in float64, by a fixed tree."""
    empty: tl.constexpr = 0.0 if KIND == "sum" else float("-inf" if KIND == "max" else "inf")
    total = tl.full((BLOCK,), empty, dtype=tl.float64)
    for start in range(first, stop, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        found = tl.load(base + tile, mask=tile < stop, other=empty)
        if KIND == "sum":
            total += found
        elif KIND == "max":
            total = tl.maximum(total, found)
        else:
            total = tl.minimum(total, found)
    if KIND == "sum":
        out = tl.sum(total, axis=0)
    elif KIND == "max":
        out = tl.max(total, axis=0)
    else:
        out = tl.min(total, axis=0)
    return out


@triton.jit(do_not_specialize=["max_tiles", "group"])
def add_partials(
    partials_ptr,
    firsts_ptr,
    counts_ptr,
    sums_ptr,
    extrema_ptr,
    max_tiles,
    num_groups,
    group,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (E, groups): adds one expert's tiles to the statistics, in place.

    `group` is the first group of the statistics that the partial sums belong to.
    """
    expert, which = tl.program_id(0), tl.program_id(1)
    first = tl.load(firsts_ptr + expert)
    stop = tl.load(firsts_ptr + expert + 1)
    base = partials_ptr + which.to(tl.int64) * max_tiles
    step = tl.num_programs(1).to(tl.int64) * max_tiles
    cell = (group + which) * E + expert
    cells = num_groups * E
    for field in tl.static_range(2):
        count = _whole(base + field * step, first, stop, "sum", BLOCK).to(tl.int64)
        count_at = counts_ptr + field * cells + cell
        tl.store(count_at, tl.load(count_at) + count)
    for field in tl.static_range(5):
        total = _whole(base + (2 + field) * step, first, stop, "sum", BLOCK)
        sum_at = sums_ptr + field * cells + cell
        tl.store(sum_at, tl.load(sum_at) + total)
    high = _whole(base + 7 * step, first, stop, "max", BLOCK).to(tl.float32)
    low = _whole(base + 8 * step, first, stop, "min", BLOCK).to(tl.float32)
    high_at = extrema_ptr + cell
    low_at = extrema_ptr + cells + cell
    tl.store(high_at, tl.maximum(tl.load(high_at), high))
    tl.store(low_at, tl.minimum(tl.load(low_at), low))
