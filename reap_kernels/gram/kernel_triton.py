"""Triton kernels of outer products: weigh rows, then per expert one product over its rows.

Arrays, with S sorted rows (see `sort.kernel_triton` for gather_index, offsets and tiles):

    h         [S, N]          rows, of which those that count are read
    factors   [S] float64     by slot; rows of factor 0 do not count
    weighted  [S, N]          factor * h, 0 where a row does not count
    a         [S, M], or (GATHER) [T, M], whose row gather_index[r] // TOP_K is that of sorted row r
    b         [S, N]          a and b are the same weighted rows where SYMMETRIC
    out       [E, M, N]       float32; out[e] += a^T b over the rows of expert e
    partials  float64         of each tile: first [tiles, N], weight [tiles], count [tiles]

A block of `out` is added to by one program, over the rows in order: the same bits run to run. Where
SYMMETRIC, blocks above the diagonal are neither computed nor read nor written. Element offsets are
64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def weigh_rows(
    h_ptr,
    factors_ptr,
    gather_index_ptr,
    offsets_ptr,
    tile_experts_ptr,
    tile_rows_ptr,
    firsts_ptr,
    weighted_ptr,
    first_ptr,
    weight_ptr,
    count_ptr,
    E,
    N,
    SUMMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (bound on tiles, ceil(N / BLOCK_N)): one tile of rows, some of their columns.

    `weighted` may be `h`: every element is read and written by one program. SUMMED: partial sums
    are written too.
    """
    tile = tl.program_id(0)
    if tile >= tl.load(firsts_ptr + E):
        return
    stop = tl.load(offsets_ptr + tl.load(tile_experts_ptr + tile) + 1).to(tl.int32)
    rows = tl.load(tile_rows_ptr + tile) + tl.arange(0, BLOCK_M)
    live = rows < stop
    slots = tl.load(gather_index_ptr + rows, mask=live, other=0)
    factor = tl.load(factors_ptr + slots, mask=live, other=0.0)
    counted = factor != 0.0
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = cols < N
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    h = tl.load(h_ptr + at, mask=counted[:, None] & within[None, :], other=0.0).to(tl.float32)
    narrow = factor.to(tl.float32)
    weighted = h * narrow[:, None]
    out = weighted.to(weighted_ptr.dtype.element_ty)
    tl.store(weighted_ptr + at, out, mask=live[:, None] & within[None, :])
    if SUMMED:
        total = tl.sum((weighted * narrow[:, None]).to(tl.float64), axis=0)
        tl.store(first_ptr + tile.to(tl.int64) * N + cols, total, mask=within)
        if tl.program_id(1) == 0:
            tl.store(weight_ptr + tile, tl.sum(factor * factor, axis=0))
            tl.store(count_ptr + tile, tl.sum(counted.to(tl.float64), axis=0))


@triton.jit
def add_moments(
    partial_first_ptr,
    partial_weight_ptr,
    partial_count_ptr,
    firsts_ptr,
    first_ptr,
    weight_ptr,
    count_ptr,
    N,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (E, ceil(N / BLOCK_N)): adds one expert's tiles, TILES at a time, to its sums."""
    expert = tl.program_id(0)
    first = tl.load(firsts_ptr + expert)
    stop = tl.load(firsts_ptr + expert + 1)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = cols < N
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    weight = tl.zeros((TILES,), dtype=tl.float64)
    count = tl.zeros((TILES,), dtype=tl.float64)
    for start in range(first, stop, TILES):
        tile = start + tl.arange(0, TILES)
        live = tile < stop
        at = partial_first_ptr + tile.to(tl.int64)[:, None] * N + cols[None, :]
        total += tl.sum(tl.load(at, mask=live[:, None] & within[None, :], other=0.0), axis=0)
        weight += tl.load(partial_weight_ptr + tile, mask=live, other=0.0)
        count += tl.load(partial_count_ptr + tile, mask=live, other=0.0)
    at = first_ptr + expert.to(tl.int64) * N + cols
    tl.store(at, tl.load(at, mask=within, other=0.0) + total, mask=within)
    if tl.program_id(1) == 0:
        weight_at = weight_ptr + expert
        tl.store(weight_at, tl.load(weight_at) + tl.sum(weight, axis=0))
        count_at = count_ptr + expert
        tl.store(count_at, tl.load(count_at) + tl.sum(count, axis=0).to(tl.int64))


@triton.jit
def _lower_block(block):
    """(row, column) of the block-th block on or below the diagonal, counted row by row."""
    row = ((tl.sqrt(8.0 * block + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: it may be off by one row at the ends of rows.
    row = tl.where(row * (row + 1) // 2 > block, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= block, row + 1, row)
    return row, block - row * (row + 1) // 2


@triton.jit
def grouped_outer(
    a_ptr,
    b_ptr,
    out_ptr,
    gather_index_ptr,
    offsets_ptr,
    M,
    N,
    blocks,
    stride_oe,
    stride_om,
    stride_on,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (E * blocks,): one program adds one BLOCK_M x BLOCK_N of one expert's matrix.

    EVEN: the blocks divide M and N.
    """
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    first = tl.load(offsets_ptr + expert).to(tl.int32)
    stop = tl.load(offsets_ptr + expert + 1).to(tl.int32)
    if first == stop:
        return
    if SYMMETRIC:
        row, column = _lower_block(block)
    else:
        row = block // tl.cdiv(N, BLOCK_N)
        column = block % tl.cdiv(N, BLOCK_N)
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, stop, BLOCK_K):
        rows = start + depth
        live = rows < stop
        b_rows = rows.to(tl.int64)
        a_rows = b_rows
        if GATHER:
            a_rows = tl.load(gather_index_ptr + rows, mask=live, other=0) // TOP_K
        a_mask = live[None, :]
        b_mask = live[:, None]
        if not EVEN:
            a_mask = a_mask & (m < M)[:, None]
            b_mask = b_mask & (n < N)[None, :]
        a = tl.load(a_ptr + a_rows[None, :] * M + m[:, None], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + b_rows[:, None] * N + n[None, :], mask=b_mask, other=0.0)
        if UPCAST:  # the interpreter's bf16 product is wrong
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = out_ptr + expert.to(tl.int64) * stride_oe
    at += m.to(tl.int64)[:, None] * stride_om + n.to(tl.int64)[None, :] * stride_on
    within = (m < M)[:, None] & (n < N)[None, :]
    tl.store(at, tl.load(at, mask=within, other=0.0) + acc, mask=within)
