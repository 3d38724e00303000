"""Triton comparison of logits: the launch."""

import torch
from torch import Tensor

from reap_kernels import device
from reap_kernels.compare import kernel_triton as kernels

WARPS = 8
# 4 logits of either row per thread: with 8, some compilers spill.
BLOCK = WARPS * 32 * 4


def compare_logits(full: Tensor, candidate: Tensor, full_lse: Tensor | None) -> tuple[Tensor, ...]:
    """See `reap_kernels.compare.op.compare_logits`."""
    rows, vocabulary = full.shape
    numbers = [torch.empty(rows, dtype=torch.float32, device=full.device) for _ in range(4)]
    same = torch.empty(rows, dtype=torch.bool, device=full.device)
    if rows:
        with device.on(full.device):
            kernels.compare_rows[(rows,)](
                full,
                candidate,
                numbers[0] if full_lse is None else full_lse,  # a stand-in is never read
                *numbers,
                same,
                vocabulary,
                *full.stride(),
                *candidate.stride(),
                KNOWN=full_lse is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
                **device.OPTIONS,
            )
    return *numbers, same
