"""Triton kernel of the RMS norm: each row is read once and written once.

Arrays, for rows [n0, n1, n2] of H columns with any strides:

    x, residual [n0, n1, n2, H]  bf16, fp16 or fp32; residual only where ADDED
    weight      [H]              any of these dtypes, only where WEIGHTED
    out         [n0, n1, n2, H]  the norm of x, or of total
    total       [n0, n1, n2, H]  residual + x rounded to x's dtype, strides of out

A program holds ROWS whole rows in registers, so that neither is read again after the mean of
squares. What a row's result is does not depend on the number of rows.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(x, TYPE: tl.constexpr, EMULATED: tl.constexpr):
    """float32 rounded to TYPE, as float32. EMULATED: the interpreter would truncate to bf16."""
    if tl.float32 == TYPE:
        y = x
    elif EMULATED and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        y = x.to(TYPE).to(tl.float32)
    return y


@triton.jit
def weighed(
    x,
    weight,
    offset,
    TYPE: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """A norm in float32 times its weight, not yet rounded; with ROUND_FIRST the factors are."""
    if ROUND_FIRST:
        y = rounded(x, TYPE, EMULATED) * rounded(offset + weight, WEIGHT, EMULATED)
    else:
        y = x * (offset + weight)
    return y


@triton.jit
def rms_norm_rows(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rows,  # n0 * n1 * n2
    n1,
    n2,
    H,
    x_0,  # strides
    x_1,
    x_2,
    x_column,
    residual_0,
    residual_1,
    residual_2,
    residual_column,
    out_0,
    out_1,
    out_2,
    out_column,
    weight_column,
    eps,
    offset,
    WEIGHTED: tl.constexpr,
    ADDED: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Grid (rows / ROWS,): one program per ROWS rows; strides and offsets may need 64 bits."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    within = (row < rows)[:, None] & (column < H)[None, :]
    at_2 = (row % n2).to(tl.int64)
    at_1 = (row // n2 % n1).to(tl.int64)
    at_0 = (row // n2 // n1).to(tl.int64)
    wide = column.to(tl.int64)[None, :]
    x_at = (at_0 * x_0 + at_1 * x_1 + at_2 * x_2)[:, None] + wide * x_column
    out_at = (at_0 * out_0 + at_1 * out_1 + at_2 * out_2)[:, None] + wide * out_column
    x = tl.load(x_ptr + x_at, within, other=0.0).to(tl.float32)
    if ADDED:
        residual_at = at_0 * residual_0 + at_1 * residual_1 + at_2 * residual_2
        residual_at = residual_at[:, None] + wide * residual_column
        residual = tl.load(residual_ptr + residual_at, within, other=0.0).to(tl.float32)
        x = rounded(x + residual, TYPE, EMULATED)
        tl.store(total_ptr + out_at, x.to(TYPE), within)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)
    y = x * scale[:, None]
    if WEIGHTED:
        WEIGHT: tl.constexpr = weight_ptr.dtype.element_ty
        place = column.to(tl.int64) * weight_column
        weight = tl.load(weight_ptr + place, column < H, other=0.0).to(tl.float32)
        y = weighed(y, weight[None, :], offset, TYPE, WEIGHT, ROUND_FIRST, EMULATED)
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + out_at, rounded(y, OUT, EMULATED).to(OUT), within)
