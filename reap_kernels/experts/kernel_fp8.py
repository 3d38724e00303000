"""Triton kernel of the experts for FP8 codes: the product reads them as checkpoints store them.

Arrays beside those of `kernel_triton`, whose epilogue this shares:

    b       [E, N, K]   E4M3 codes, rows of any stride
    scale   [E, R, C]   row n of b is row first_row + n * STEP of its matrix, whose blocks of ROWS x
                        COLUMNS elements share a scale
    a                   bf16, which holds every value of E4M3, and their product in float32

A scale multiplies what a block of K adds up to, in float32: the weight is the exact code times the
scale, which a dequantized weight in bf16 is a rounding of.
"""

import triton
import triton.language as tl

from reap_kernels.experts.kernel_triton import rows_of, tile_of, write_tile


@triton.jit
def _scaled_step(a, b_ptrs, scale_ptrs, mask, within, acc, MASKED: tl.constexpr):
    """acc + (a @ b) * scale for one block of K."""
    b = tl.load(b_ptrs, mask=mask, other=0.0) if MASKED else tl.load(b_ptrs)
    scale = tl.load(scale_ptrs, mask=within, other=0.0) if MASKED else tl.load(scale_ptrs)
    return acc + tl.dot(a, b.to(a.dtype)) * scale.to(tl.float32)[None, :]


@triton.jit
def grouped_product_fp8(
    a_ptr,
    b_ptr,
    b_gate_ptr,
    scale_ptr,
    scale_gate_ptr,
    bias_ptr,
    bias_gate_ptr,
    out_ptr,
    gather_index_ptr,
    offsets_ptr,
    tile_experts_ptr,
    tile_rows_ptr,
    firsts_ptr,
    E,
    N,
    K,
    limit,
    alpha,
    stride_am,
    stride_ak,
    stride_be,
    stride_bn,
    stride_bk,
    first_row,
    first_row_gate,
    stride_se,
    stride_sr,
    stride_sc,
    stride_bias_e,
    stride_bias_n,
    stride_bias_ge,
    stride_bias_gn,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (bound on tiles * ceil(N / BLOCK_N),): one program writes one BLOCK_M x BLOCK_N of out.

    ACTIVATION is as in `grouped_product`. BLOCK_K divides COLUMNS, so that a block of K has one
    scale for each column of out.
    """
    tl.static_assert(COLUMNS % BLOCK_K == 0, "a block of K reaches into a second block of scales")
    GATED: tl.constexpr = ACTIVATION != "none" and ACTIVATION != "relu2"
    pid = tl.program_id(0)
    num_tiles = tl.load(firsts_ptr + E)
    num_n = tl.cdiv(N, BLOCK_N)
    if pid >= num_tiles * num_n:
        return
    tile, column = tile_of(pid, num_tiles, num_n, GROUP_M)
    expert = tl.load(tile_experts_ptr + tile)
    rows, live, source = rows_of(
        tile, expert, gather_index_ptr, offsets_ptr, tile_rows_ptr, GATHER, TOP_K, BLOCK_M
    )
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Bases advance along K, offsets stay: gate and up share theirs, which saves registers.
    a_offsets = source[:, None] * stride_am + k[None, :] * stride_ak
    wide = cols.to(tl.int64)
    b_offsets = wide[None, :] * stride_bn + k[:, None] * stride_bk
    b = b_ptr + expert.to(tl.int64) * stride_be
    within = cols < N
    scale = scale_ptr + expert.to(tl.int64) * stride_se
    scales = scale + (first_row + wide * STEP) // ROWS * stride_sr
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GATED:
        b_gate = b_gate_ptr + expert.to(tl.int64) * stride_be
        scale = scale_gate_ptr + expert.to(tl.int64) * stride_se
        scales_gate = scale + (first_row_gate + wide * STEP) // ROWS * stride_sr
        acc_gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    MASKED: tl.constexpr = not (EVEN_N and EVEN_K)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr + a_offsets)
            mask = within[None, :]
        else:
            a = tl.load(a_ptr + a_offsets, mask=k[None, :] < K - start, other=0.0)
            mask = within[None, :] & (k[:, None] < K - start)
        if UPCAST:
            a = a.to(tl.float32)
        at = start // COLUMNS * stride_sc
        acc = _scaled_step(a, b + b_offsets, scales + at, mask, within, acc, MASKED)
        if GATED:
            acc_gate = _scaled_step(
                a, b_gate + b_offsets, scales_gate + at, mask, within, acc_gate, MASKED
            )
            b_gate += BLOCK_K * stride_bk
        a_ptr += BLOCK_K * stride_ak
        b += BLOCK_K * stride_bk

    if not GATED:
        acc_gate = acc
    write_tile(
        acc_gate,
        acc,
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
