"""CPU RMS norm: a model's own operations, in their order."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `reap_kernels.norm.op.rms_norm`."""
    total = None if residual is None else x + residual
    return normalized(x if total is None else total, weight, eps, offset, round_first), total


def normalized(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> Tensor:
    """The norm of rows, each operation with the rounding that torch gives it."""
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(dim=-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if round_first:
        return normed.to(x.dtype) * (offset + weight if offset else weight)
    return (normed * (offset + weight.float())).to(x.dtype)
