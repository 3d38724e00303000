"""Copies and sums of many small tensors, by a few operations for all of them."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Copies:
    """What is to be copied and added.

    Attributes:
        copied: pairs (to, from) of one shape, dtype and device.
        added: pairs (sum, what is added to it in place), likewise.
    """

    copied: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    added: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def do_all(parts: Iterable[Copies]) -> None:
    """Copies and adds everything, by one operation for each device and dtype."""
    parts = list(parts)
    for targets, sources in _alike(pair for part in parts for pair in part.copied):
        torch._foreach_copy_(targets, sources)
    for targets, sources in _alike(pair for part in parts for pair in part.added):
        torch._foreach_add_(targets, sources)


def _alike(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Pairs by device and dtype, as a list of first and one of second tensors."""
    found = defaultdict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]](
        lambda: ([], [])
    )
    for target, source in pairs:
        targets, sources = found[target.device, target.dtype]
        targets.append(target)
        sources.append(source)
    return list(found.values())
