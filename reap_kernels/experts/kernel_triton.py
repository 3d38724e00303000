"""Triton kernels of the experts: one grouped product for every use, and the activation on its own.

Arrays, with S sorted rows (see `sort.kernel_triton` for gather_index, offsets and tiles):

    a        [T, K] (GATHER) or [S, K]  left operand; row r reads a[r], or with GATHER
                                        a[gather_index[r] // TOP_K]
    b        per expert [N, K]          right operand, out x in with free strides: one stacked
                                        tensor, or (TABLE) an [E] int64 array of addresses
    b_gate   likewise                   gate half of a gated product; b's shape and strides
    bias     [E, N]                     added before the activation, where BIASED
    out      [S, N]                     rows below offsets[E] are written, the others are not

Every row of `out` is written by one program, K is summed in one fixed order: the same bits run to
run. Element offsets are 64-bit: S * N, and E * N * K, exceed 2^31 for models in use.
"""

import triton
import triton.language as tl


@triton.jit
def _at_most(x, limit):
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _within(x, limit):
    return tl.maximum(_at_most(x, limit), -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def apply_activation(gate, up, limit, alpha, ACTIVATION: tl.constexpr):
    """The formulas of `activation.Activation` in float32; NaN passes through every clamp."""
    if ACTIVATION == "relu2":
        positive = tl.maximum(up, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out = positive * positive
    elif ACTIVATION == "silu":
        out = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = sigmoid(2 z)
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        out = gate * tl.sigmoid(2.0 * z) * up
    elif ACTIVATION == "silu_clamped_out":
        out = _at_most(gate * tl.sigmoid(gate), limit) * _within(up, limit)
    elif ACTIVATION == "silu_clamped_in":
        low = _at_most(gate, limit)
        out = low * tl.sigmoid(low) * _within(up, limit)
    else:
        tl.static_assert(ACTIVATION == "swiglu_oai", "unknown activation")
        low = _at_most(gate, limit)
        out = low * tl.sigmoid(alpha * low) * (_within(up, limit) + 1.0)
    return out


@triton.jit
def tile_of(pid, num_tiles, num_n, GROUP_M: tl.constexpr):
    """The tile of rows and the block of columns of a program: it walks GROUP_M tiles before the
    next block, so that neighbors share b in L2.
    """
    group = pid // (GROUP_M * num_n)
    members = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    inside = pid - group * GROUP_M * num_n
    return group * GROUP_M + inside % members, inside // members


@triton.jit
def rows_of(
    tile,
    expert,
    gather_index_ptr,
    offsets_ptr,
    tile_rows_ptr,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The rows of a tile, which of them are the expert's, and the rows of `a` that they read."""
    first = tl.load(tile_rows_ptr + tile)
    stop = tl.load(offsets_ptr + expert + 1).to(tl.int32)
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < stop
    # Rows past the expert's last repeat its first: loads then need no mask, and stores have one.
    source = tl.where(live, rows, first).to(tl.int64)
    if GATHER:
        source = tl.load(gather_index_ptr + source).to(tl.int64) // TOP_K
    return rows, live, source


@triton.jit
def _matrix(ptr, expert, stride_e, a_ptr, TABLE: tl.constexpr, ALIGNED: tl.constexpr):
    """Address of one expert's matrix, of the left operand's dtype."""
    if TABLE:
        base = tl.load(ptr + expert).to(tl.pointer_type(a_ptr.dtype.element_ty))
        if ALIGNED:
            base = tl.multiple_of(base, 16)
    else:
        base = ptr + expert.to(tl.int64) * stride_e
    return base


@triton.jit
def _step(
    a, b_ptrs, mask, acc, PRECISION: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr
):
    """acc + a @ b for one block of K."""
    b = tl.load(b_ptrs, mask=mask, other=0.0) if MASKED else tl.load(b_ptrs)
    if UPCAST:  # the interpreter's bf16 product is wrong
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def write_tile(
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
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Adds biases to a tile's sums, applies the activation, and stores the rows that are live.
    `gate` is `up` where there is no gate half.
    """
    GATED: tl.constexpr = ACTIVATION != "none" and ACTIVATION != "relu2"
    within = cols < N
    wide = cols.to(tl.int64)
    if BIASED:
        at = bias_ptr + expert.to(tl.int64) * stride_bias_e + wide * stride_bias_n
        up += tl.load(at, mask=within, other=0.0).to(tl.float32)[None, :]
        if GATED:
            at = bias_gate_ptr + expert.to(tl.int64) * stride_bias_ge + wide * stride_bias_gn
            gate += tl.load(at, mask=within, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "none":
        up = apply_activation(gate, up, limit, alpha, ACTIVATION)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + wide[None, :]
    tl.store(out_ptrs, up.to(out_ptr.dtype.element_ty), mask=live[:, None] & within[None, :])


@triton.jit
def grouped_product(
    a_ptr,
    b_ptr,
    b_gate_ptr,
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
    stride_bias_e,
    stride_bias_n,
    stride_bias_ge,
    stride_bias_gn,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (bound on tiles * ceil(N / BLOCK_N),): one program writes one BLOCK_M x BLOCK_N of out.

    ACTIVATION is "none" (out = a @ b), "relu2" (no gate half), or gated (b_gate is read too).
    """
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
    b = _matrix(b_ptr, expert, stride_be, a_ptr, TABLE, ALIGNED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GATED:
        b_gate = _matrix(b_gate_ptr, expert, stride_be, a_ptr, TABLE, ALIGNED)
        acc_gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    MASKED: tl.constexpr = not (EVEN_N and EVEN_K)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr + a_offsets)
            mask = cols[None, :] < N
        else:
            a = tl.load(a_ptr + a_offsets, mask=k[None, :] < K - start, other=0.0)
            mask = (cols[None, :] < N) & (k[:, None] < K - start)
        if UPCAST:
            a = a.to(tl.float32)
        acc = _step(a, b + b_offsets, mask, acc, PRECISION, MASKED, UPCAST)
        if GATED:
            acc_gate = _step(a, b_gate + b_offsets, mask, acc_gate, PRECISION, MASKED, UPCAST)
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


@triton.jit
def activate_rows(
    up_ptr,
    gate_ptr,
    out_ptr,
    offsets_ptr,
    E,
    N,
    limit,
    alpha,
    stride_um,
    stride_un,
    stride_gm,
    stride_gn,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (ceil(S / BLOCK_M), ceil(N / BLOCK_N)): the activation of [S, N] halves alone."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < tl.load(offsets_ptr + E))[:, None] & (cols < N)[None, :]
    wide = rows.to(tl.int64)[:, None]
    at = wide * stride_um + cols[None, :] * stride_un
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = wide * stride_gm + cols[None, :] * stride_gn
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out = apply_activation(gate, up, limit, alpha, ACTIVATION)
    tl.store(out_ptr + wide * N + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
