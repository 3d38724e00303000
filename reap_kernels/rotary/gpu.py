"""Triton rotary embeddings: the launch."""

import torch
from torch import Tensor

from reap_kernels import device
from reap_kernels.norm.gpu import OPTIONS, power_of_two, rows_of_tile, warps_of_tile
from reap_kernels.rotary import kernel_triton as kernels
from reap_kernels.rotary.call import Form


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor | None]:
    """See `reap_kernels.rotary.op.rotary`."""
    batch, heads, tokens, width = q.shape
    out_q = torch.empty_like(q)
    out_k = None if k is None else torch.empty_like(k)
    second, out_second = (q, out_q) if k is None or out_k is None else (k, out_k)  # never read
    k_heads = 0 if k is None else k.shape[1]
    rotated = cos.shape[-1] * (2 if form.per_pair else 1)
    tile = power_of_two(width) * (2 if width > rotated else 1)  # columns that pass have their own
    heads_q, heads_k = (rows_of_tile(tile, power_of_two(n)) for n in (heads, k_heads))
    blocks = -(-heads // heads_q)  # and then those of k
    grid = (batch * tokens, blocks + -(-k_heads // heads_k))
    if not grid[0] * grid[1]:
        return out_q, out_k
    with device.on(q.device):
        kernels.rotate_tokens[grid](
            *(q, second, cos, sin),
            q if q_weight is None else q_weight,
            second if k_weight is None else k_weight,
            *(out_q, out_second),
            *(tokens, heads, k_heads, blocks, width, rotated, form.start),
            *(step for x in (q, second, out_q, out_second) for step in x.stride()),
            *_strides(cos),
            *_strides(sin),
            *(0 if weight is None else weight.stride(0) for weight in (q_weight, k_weight)),
            *(form.eps, form.offset),
            NORMED_Q=q_weight is not None,
            NORMED_K=k_weight is not None,
            INTERLEAVED=form.interleaved,
            SEPARATE=form.separate,
            PER_PAIR=form.per_pair,
            FLOAT32=form.float32,
            ROUND_FIRST=form.round_first,
            HEADS_Q=heads_q,
            HEADS_K=heads_k,
            PAIRS=power_of_two(rotated // 2),
            REST=power_of_two(width - rotated) if width > rotated else 0,
            EMULATED=device.interpreted(),
            num_warps=warps_of_tile(max(heads_q, heads_k) * tile),
            **OPTIONS,
        )
    return out_q, out_k


def _strides(table: Tensor) -> tuple[int, int, int]:
    """Strides of a table of angles, whose one sequence may stand for all."""
    batch, token, column = table.stride()
    return 0 if table.shape[0] == 1 else batch, token, column
