"""Reference RMS norm, from the formula, in float64."""

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
    """See `reap_kernels.norm.op.rms_norm`; rounds the sum and the result, nothing between."""
    total = None if residual is None else x + residual
    normed = normalized(x if total is None else total, weight, eps, offset)
    return normed.to(result_dtype(x, weight, round_first)), total


def normalized(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times (offset + weight), in float64."""
    x = x.double()
    x = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * (offset + weight.double())


def result_dtype(x: Tensor, weight: Tensor | None, round_first: bool) -> torch.dtype:
    """Dtype of the result: that of x, unless a norm rounded to it is multiplied by a wider one."""
    if weight is None or not round_first:
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)
