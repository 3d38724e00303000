"""Triton kernel of the comparison of logits: two passes over a row, nothing of its size written.

Arrays, with V the vocabulary:

    full, candidate [N, V]       logits, any strides, each of its own float dtype
    known           [N] float32  log-sum-exp of full's rows, where KNOWN
    acceptance, kl, full_lse, candidate_lse [N] float32, same_top [N] bool: the results

Every lane keeps the largest logit it has seen, where, and the sum of exponentials relative to it;
lanes meet once, after a pass. Sums follow fixed trees in float32: the same bits run to run.
"""

import triton
import triton.language as tl


@triton.jit
def _loaded(row_ptr, column, stride, within):
    """Logits of a row, -inf beyond it; columns may be so far apart that 32 bits overflow."""
    at = row_ptr + column.to(tl.int64) * stride
    return tl.load(at, within, other=float("-inf")).to(tl.float32)


@triton.jit
def _seen(x, start, high, total, top):
    """A lane's maximum, sum of exponentials and first place of the maximum, with one more logit."""
    # One of the two factors of a rescaled sum is always exp(0).
    scale = tl.exp(-tl.abs(x - high))
    total = tl.where(x > high, total * scale + 1.0, total + scale)
    top = tl.where(x > high, start, top)
    return tl.maximum(x, high), total, top


@triton.jit
def _joined(high, total, top, lane):
    """All lanes': log-sum-exp, and the first place of the maximum."""
    highest = tl.max(high, axis=0)
    total = tl.sum(total * tl.exp(high - highest), axis=0)
    first = tl.min(tl.where(high == highest, top + lane, 0x7FFFFFFF), axis=0)
    lse = highest + tl.log(total)
    return lse + (lse - lse), first  # NaN unless finite


@triton.jit
def compare_rows(
    full_ptr,
    candidate_ptr,
    known_ptr,
    acceptance_ptr,
    kl_ptr,
    full_lse_ptr,
    candidate_lse_ptr,
    same_top_ptr,
    V,
    full_row,
    full_column,
    candidate_row,
    candidate_column,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N,): one program per row."""
    LEAST: tl.constexpr = -3.4028234663852886e38  # finite, so that -inf less it is no NaN
    row = tl.program_id(0)
    full_ptr += row.to(tl.int64) * full_row
    candidate_ptr += row.to(tl.int64) * candidate_row
    lane = tl.arange(0, BLOCK)
    high_f = tl.full((BLOCK,), LEAST, tl.float32)
    high_c = tl.full((BLOCK,), LEAST, tl.float32)
    total_f = tl.zeros((BLOCK,), tl.float32)
    total_c = tl.zeros((BLOCK,), tl.float32)
    top_f = tl.zeros((BLOCK,), tl.int32)
    top_c = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        column = start + lane
        within = column < V
        f = _loaded(full_ptr, column, full_column, within)
        c = _loaded(candidate_ptr, column, candidate_column, within)
        high_f, total_f, top_f = _seen(f, start, high_f, total_f, top_f)
        high_c, total_c, top_c = _seen(c, start, high_c, total_c, top_c)
    lse_f, first_f = _joined(high_f, total_f, top_f, lane)
    lse_c, first_c = _joined(high_c, total_c, top_c, lane)
    if KNOWN:
        lse_f = tl.load(known_ptr + row)
    accepted = tl.zeros((BLOCK,), tl.float32)
    diverged = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + lane
        within = column < V
        f = _loaded(full_ptr, column, full_column, within)
        c = _loaded(candidate_ptr, column, candidate_column, within)
        log_p = f - lse_f
        log_q = c - lse_c
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        accepted += tl.minimum(p, q)
        # q - p adds up to nothing, and makes errors of either log-sum-exp matter in second order.
        diverged += tl.where(p > 0, p * (log_p - log_q) - p, 0.0) + q
    broken = (lse_f - lse_f) + (lse_c - lse_c)  # 0, or NaN
    tl.store(acceptance_ptr + row, tl.sum(accepted, axis=0) + broken)
    tl.store(kl_ptr + row, tl.sum(diverged, axis=0) + broken)
    tl.store(full_lse_ptr + row, lse_f)
    tl.store(candidate_lse_ptr + row, lse_c)
    tl.store(same_top_ptr + row, (first_f == first_c) & (broken == 0))
