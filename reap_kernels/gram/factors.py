"""What each routed row is multiplied by before its outer product: the root of s g^2, or 0."""

import math

import torch
from torch import Tensor

from reap_kernels.errors import DtypeError, ShapeError, UsageError

_REMEDY = "give finite factors of 0 or more"


def checked_scale(scale: float | Tensor, tokens: int) -> float | Tensor:
    """The factor of all tokens, or of each, [tokens], checked.

    Raises:
        UsageError, ShapeError, DtypeError: it is neither, or negative or not finite.
    """
    if not isinstance(scale, Tensor):
        if not (isinstance(scale, int | float) and math.isfinite(scale) and scale >= 0):
            raise UsageError(f"scale is {scale!r}; {_REMEDY}")
        return scale
    if tuple(scale.shape) != (tokens,):
        raise ShapeError(
            f"scale has shape {tuple(scale.shape)}; expected a number or ({tokens},), one per token"
        )
    if not scale.dtype.is_floating_point:
        raise DtypeError(f"scale is {scale.dtype}; expected a float dtype")
    fits = scale.isfinite() & (scale >= 0)
    if scale.device.type != "cpu" or torch.compiler.is_compiling():
        # Reading values would wait for the device, or break a compiled graph.
        torch._assert_async(fits.all(), f"scale has values below 0 or not finite; {_REMEDY}")
    elif not bool(fits.all()):
        raise UsageError(f"scale has the value {float(scale[~fits][0])}; {_REMEDY}")
    return scale


def row_factors(router_weights: Tensor, mask: Tensor | None, scale: float | Tensor) -> Tensor:
    """sqrt(s) g of each slot, so that s g^2 h h^T is the outer product of one row with itself.

    Args:
        router_weights: [T, k], g.
        mask: [T] bool, tokens that count; None for all.
        scale: s of all tokens, or [T].

    Returns:
        [T, k] float64; exactly 0 where a slot does not count.
    """
    factors = router_weights.double()
    if isinstance(scale, Tensor):
        factors = factors * scale.double().sqrt()[:, None]
    elif scale != 1:
        factors = factors * math.sqrt(scale)
    return factors if mask is None else factors.masked_fill(~mask[:, None], 0.0)
