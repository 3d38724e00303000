"""Triton kernel of rotary embeddings: queries and keys are read once and written once.

Arrays, all with any strides, B sequences of S tokens:

    q, out_q [B, heads of q, S, D]   bf16, fp16 or fp32
    k, out_k [B, heads of k, S, D]   of q's dtype; only where there are blocks of heads of k
    cos, sin [B, S, R or R / 2]      a column per column that is rotated, or per pair (PER_PAIR)
    q_weight, k_weight [D]           of norms over D, where q and k are normed

A program computes a block of heads of one token, whose cosines and sines it reads once. R columns
from `start` on are rotated, and the D - R others copied.
"""

import triton
import triton.language as tl

from reap_kernels.norm.kernel_triton import rounded, weighed


@triton.jit
def _place(column, start, R, PAIRED: tl.constexpr):
    """Where in a head the columns of a tile lie: those that are rotated, or the others."""
    at = column + start if PAIRED else tl.where(column < start, column, column + R)
    return at.to(tl.int64)


@triton.jit
def _normed(
    x,
    scale,
    weight_ptr,
    weight_column,
    offset,
    at,
    within,
    NORMED: tl.constexpr,
    TYPE: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Columns of heads after their norm, rounded."""
    if NORMED:
        WEIGHT: tl.constexpr = weight_ptr.dtype.element_ty
        weight = tl.load(weight_ptr + at * weight_column, within, other=0.0).to(tl.float32)
        y = weighed(x * scale, weight[None, :], offset, TYPE, WEIGHT, ROUND_FIRST, EMULATED)
        y = rounded(y, TYPE, EMULATED)
    else:
        y = x
    return y


@triton.jit
def _turned(
    a, b, cos_a, sin_a, cos_b, sin_b, TYPE: tl.constexpr, EMULATED: tl.constexpr
):  # fmt: skip
    """Rotated pairs, with products and sums rounded to TYPE."""
    first = rounded(a * cos_a, TYPE, EMULATED) - rounded(b * sin_a, TYPE, EMULATED)
    second = rounded(b * cos_b, TYPE, EMULATED) + rounded(a * sin_b, TYPE, EMULATED)
    return first, second


@triton.jit
def _loaded(row_ptr, at, step, within):
    """Columns of a block of heads, in float32."""
    return tl.load(row_ptr + (at * step)[None, :], within, other=0.0).to(tl.float32)


@triton.jit
def _rotate_heads(
    x_ptr,  # of a token; strides of heads and columns
    x_head,
    x_column,
    out_ptr,
    out_head,
    out_column,
    weight_ptr,
    weight_column,
    first_head,
    heads,
    cos_a,  # [PAIRS] float32, like those below
    sin_a,
    cos_b,
    sin_b,
    D,
    R,
    start,
    eps,
    offset,
    NORMED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SEPARATE: tl.constexpr,
    FLOAT32: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Norms and rotates HEADS heads of one token."""
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    PRODUCT: tl.constexpr = tl.float32 if FLOAT32 else TYPE
    head = first_head + tl.arange(0, HEADS)
    there = (head < heads)[:, None]
    x_row = x_ptr + (head.to(tl.int64) * x_head)[:, None]
    out_row = out_ptr + (head.to(tl.int64) * out_head)[:, None]
    pair = tl.arange(0, PAIRS)
    in_a = pair < R // 2
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)
        in_x = column < R
        x_at = _place(column, start, R, True)
        x = _loaded(x_row, x_at, x_column, there & in_x[None, :])
        squares = tl.sum(x * x, axis=1)
    else:
        a_at = _place(pair, start, R, True)
        b_at = _place(pair + R // 2, start, R, True)
        a = _loaded(x_row, a_at, x_column, there & in_a[None, :])
        b = _loaded(x_row, b_at, x_column, there & in_a[None, :])
        squares = tl.sum(a * a + b * b, axis=1)
    if REST:
        other = tl.arange(0, REST)
        in_rest = other < D - R
        rest_at = _place(other, start, R, False)
        rest = _loaded(x_row, rest_at, x_column, there & in_rest[None, :])
        squares += tl.sum(rest * rest, axis=1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    if INTERLEAVED:
        x = _normed(
            x, scale, weight_ptr, weight_column, offset, x_at, in_x,
            NORMED, TYPE, ROUND_FIRST, EMULATED,
        )  # fmt: skip
        a, b = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    else:
        a = _normed(
            a, scale, weight_ptr, weight_column, offset, a_at, in_a,
            NORMED, TYPE, ROUND_FIRST, EMULATED,
        )  # fmt: skip
        b = _normed(
            b, scale, weight_ptr, weight_column, offset, b_at, in_a,
            NORMED, TYPE, ROUND_FIRST, EMULATED,
        )  # fmt: skip
    a, b = _turned(
        a, b, cos_a[None, :], sin_a[None, :], cos_b[None, :], sin_b[None, :], PRODUCT, EMULATED
    )
    a = rounded(a, TYPE, EMULATED).to(TYPE)
    b = rounded(b, TYPE, EMULATED).to(TYPE)
    if INTERLEAVED and not SEPARATE:
        place = out_row + (x_at * out_column)[None, :]
        tl.store(place, tl.interleave(a, b), there & in_x[None, :])
    else:
        a_at = _place(pair, start, R, True) * out_column
        b_at = _place(pair + R // 2, start, R, True) * out_column
        tl.store(out_row + a_at[None, :], a, there & in_a[None, :])
        tl.store(out_row + b_at[None, :], b, there & in_a[None, :])
    if REST:
        rest = _normed(
            rest, scale, weight_ptr, weight_column, offset, rest_at, in_rest,
            NORMED, TYPE, ROUND_FIRST, EMULATED,
        )  # fmt: skip
        place = out_row + (rest_at * out_column)[None, :]
        tl.store(place, rest.to(TYPE), there & in_rest[None, :])


@triton.jit
def rotate_tokens(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    out_q_ptr,
    out_k_ptr,
    S,
    q_heads,
    k_heads,
    q_blocks,  # of HEADS_Q heads
    D,
    R,
    start,
    q_batch,  # strides
    q_head,
    q_token,
    q_column,
    k_batch,
    k_head,
    k_token,
    k_column,
    out_q_batch,
    out_q_head,
    out_q_token,
    out_q_column,
    out_k_batch,
    out_k_head,
    out_k_token,
    out_k_column,
    cos_batch,
    cos_token,
    cos_column,
    sin_batch,
    sin_token,
    sin_column,
    q_weight_column,
    k_weight_column,
    eps,
    offset,
    NORMED_Q: tl.constexpr,
    NORMED_K: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SEPARATE: tl.constexpr,
    PER_PAIR: tl.constexpr,
    FLOAT32: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    HEADS_Q: tl.constexpr,
    HEADS_K: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Grid (B * S, blocks of heads of q and of k): offsets may need 64 bits."""
    batch = (tl.program_id(0) // S).to(tl.int64)
    token = (tl.program_id(0) % S).to(tl.int64)
    block = tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    within = pair < R // 2
    if PER_PAIR:
        a_at = pair.to(tl.int64)
        b_at = a_at
    elif INTERLEAVED:
        a_at = 2 * pair.to(tl.int64)
        b_at = a_at + 1
    else:
        a_at = pair.to(tl.int64)
        b_at = a_at + R // 2
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    cos_a = tl.load(cos_ptr + a_at * cos_column, within, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + a_at * sin_column, within, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + b_at * cos_column, within, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + b_at * sin_column, within, other=0.0).to(tl.float32)
    if block < q_blocks:
        _rotate_heads(
            q_ptr + batch * q_batch + token * q_token, q_head, q_column,
            out_q_ptr + batch * out_q_batch + token * out_q_token, out_q_head, out_q_column,
            q_weight_ptr, q_weight_column, block * HEADS_Q, q_heads,
            cos_a, sin_a, cos_b, sin_b, D, R, start, eps, offset,
            NORMED_Q, INTERLEAVED, SEPARATE, FLOAT32, ROUND_FIRST, HEADS_Q, PAIRS, REST, EMULATED,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr + batch * k_batch + token * k_token, k_head, k_column,
            out_k_ptr + batch * out_k_batch + token * out_k_token, out_k_head, out_k_column,
            k_weight_ptr, k_weight_column, (block - q_blocks) * HEADS_K, k_heads,
            cos_a, sin_a, cos_b, sin_b, D, R, start, eps, offset,
            NORMED_K, INTERLEAVED, SEPARATE, FLOAT32, ROUND_FIRST, HEADS_K, PAIRS, REST, EMULATED,
        )  # fmt: skip
