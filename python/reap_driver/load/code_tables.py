"""Looks up the values of 4-bit codes, two in a byte."""

from collections.abc import Sequence

import torch
from torch import Tensor


def values_of_bytes(codes: Tensor, table: Sequence[float] | Tensor, *, low_first: bool) -> Tensor:
    """The values of codes in row order.

    Args:
        codes: bytes [..., n], uint8.
        table: the 16 values, in float32.
        low_first: whether a byte's first code is in its low bits.

    Returns:
        float32 [..., 2 * n].

    Example:
        >>> values_of_bytes(torch.tensor([0x21], dtype=torch.uint8), range(16), low_first=True)
        tensor([1., 2.])
    """
    values = torch.as_tensor(table, dtype=torch.float32, device=codes.device)
    byte = torch.arange(256, device=codes.device)
    halves = (byte & 15, byte >> 4) if low_first else (byte >> 4, byte & 15)
    pairs = torch.stack([values[half] for half in halves], -1)
    return pairs[codes.int()].flatten(-2)
