"""Triton kernel of the grouped product for GPUs with TMA: persistent, operands by descriptors.

Arrays, with S sorted rows (see `kernel_triton`, whose product this one equals up to the order in
which a tile's K is summed by the tensor cores):

    a        [T, K] (GATHER) or [S, K]  left operand; with GATHER rows are looked up through
                                        pointers, else a box of a descriptor is read
    b        [E, N, K]                  right operand, stacked; rows contiguous, other strides free
                                        multiples of 16 bytes
    b        [E, 2, N, K]               of a gated product: gates, and `stride_bh` behind each its
                                        up, so that one box holds both halves and one accumulator
                                        both products; [E, N, 2, K] where they are INTERLEAVED
    bias     [E, N]                     added before the activation, where BIASED
    out      [S, N]                     rows below offsets[E] are written, the others are not

Boxes that pass the end of a tensor are filled with zeros; a box of `a` that passes the last row of
an expert holds rows of the next, which are computed and not stored. Descriptors are made on the
device, in scratch that the launch provides.
"""

import triton
import triton.language as tl

from reap_kernels.experts.kernel_triton import tile_of, write_tile


@triton.jit
def _halves(
    acc,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of gate and of up; both are `acc` where there is no gate half."""
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
    elif GATED:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))
        gate, up = tl.split(pairs)
    else:
        gate = acc
        up = acc
    return gate, up


@triton.jit
def grouped_product_tma(
    a_ptr,
    b_ptr,
    bias_ptr,
    bias_gate_ptr,
    out_ptr,
    gather_index_ptr,
    offsets_ptr,
    tile_experts_ptr,
    tile_rows_ptr,
    firsts_ptr,
    E,
    S,
    N,
    K,
    limit,
    alpha,
    stride_am,
    stride_ak,
    stride_be,
    stride_bh,
    stride_bn,
    stride_bias_e,
    stride_bias_n,
    stride_bias_ge,
    stride_bias_gn,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (as many programs as run at once,): each writes some BLOCK_M x BLOCK_N of out.

    ACTIVATION is "none" (out = a @ b), "relu2" (no gate half), or gated. Both loops are one to the
    compiler, so that a tile's first loads are under way while the tile before is stored.
    """
    GATED: tl.constexpr = ACTIVATION != "none" and ACTIVATION != "relu2"
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    # Strides of a descriptor grow from the last dimension to the first.
    if INTERLEAVED:
        b_boxes = tl.make_tensor_descriptor(
            b_ptr, [E, 2 * N, K], [stride_be, stride_bh, 1], [1, WIDTH, BLOCK_K]
        )
    elif GATED:
        b_boxes = tl.make_tensor_descriptor(
            b_ptr,
            [E, 2, N, K],
            [stride_be, stride_bh, stride_bn, 1],
            [1, 2, BLOCK_N, BLOCK_K],
        )
    else:
        b_boxes = tl.make_tensor_descriptor(
            b_ptr, [E, N, K], [stride_be, stride_bn, 1], [1, BLOCK_N, BLOCK_K]
        )
    if not GATHER:
        a_boxes = tl.make_tensor_descriptor(a_ptr, [S, K], [stride_am, 1], [BLOCK_M, BLOCK_K])
    num_tiles = tl.load(firsts_ptr + E)
    num_n = tl.cdiv(N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for pid in tl.range(tl.program_id(0), num_tiles * num_n, tl.num_programs(0), flatten=True):
        tile, column = tile_of(pid, num_tiles, num_n, GROUP_M)
        expert = tl.load(tile_experts_ptr + tile)
        first = tl.load(tile_rows_ptr + tile)
        stop = tl.load(offsets_ptr + expert + 1).to(tl.int32)
        rows = first + tl.arange(0, BLOCK_M)
        live = rows < stop
        if GATHER:
            # Rows past the expert's last repeat its first: loads need no mask, and stores have one.
            slots = tl.load(gather_index_ptr + tl.where(live, rows, first))
            source = slots.to(tl.int64) // TOP_K
            a_ptrs = a_ptr + source[:, None] * stride_am + k[None, :] * stride_ak
        acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            if GATHER:
                mask = k[None, :] < K - start
                a = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=mask, other=0.0)
                a_ptrs += BLOCK_K * stride_ak
            else:
                a = a_boxes.load([first, start])
            if INTERLEAVED:
                b = b_boxes.load([expert, column * WIDTH, start])
            elif GATED:
                b = b_boxes.load([expert, 0, column * BLOCK_N, start])
            else:
                b = b_boxes.load([expert, column * BLOCK_N, start])
            b = tl.reshape(b, (WIDTH, BLOCK_K))
            if UPCAST:  # the interpreter's bf16 product is wrong
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

        gate, up = _halves(acc, GATED, INTERLEAVED, BLOCK_M, BLOCK_N)
        cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
        write_tile(
            gate,
            up,
            bias_ptr,
            bias_gate_ptr,
            out_ptr,
            expert,
            rows,
            live,
            cols,
            N,
            limit,
            alpha,
            stride_bias_e,
            stride_bias_n,
            stride_bias_ge,
            stride_bias_gn,
            ACTIVATION,
            BIASED,
        )
