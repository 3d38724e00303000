"""What a layer does around its products, as types: sort slots, combine with norms, reduce into
statistics.

Each stage is a function with the same arguments whatever kernels it launches, so that kernels of
different kinds can follow each other in one layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels.sort.slots import SortedSlots
from reap_kernels.stats import LayerStats

# Rows reduced together where no product gives tiles of its own.
TILE = 128
# Fields of a partial sum: 2 counts, 5 sums, 2 extrema, as `LayerStats` has them.
FIELDS = 9


@dataclass(frozen=True)
class SlotMeasures:
    """||f||, largest and smallest element of f, by slot; each [S] float32.

    Slots that no expert serves are not written.
    """

    norm: Tensor
    high: Tensor
    low: Tensor

    @classmethod
    def empty(cls, slots: int, where: torch.device) -> "SlotMeasures":
        """Room for `slots` slots."""
        # Tensors of their own, aligned whatever the number of slots.
        return cls(*(torch.empty(slots, dtype=torch.float32, device=where) for _ in range(3)))


Sort = Callable[[Tensor, Tensor | None, int], SortedSlots]
Combine = Callable[[Tensor, Tensor, SortedSlots | None, Tensor | None, SlotMeasures | None], None]
Reduce = Callable[
    [SlotMeasures, Tensor, SortedSlots, LayerStats, Tensor | None, int | Tensor, int], None
]


@dataclass(frozen=True)
class StageKernels:
    """One choice of kernels.

    Attributes:
        sort: (ids [T, k], weights [T, k] or None, E) -> the sorted slots.
        combine: (y [S, H] by sorted row, or by slot where the sorted slots are None; router weights
            [T, k], contiguous; the sorted slots; out [T, H] or None, receives sums weighted by
            them; measures or None, receives norms and extrema) reads every row of y once.
        reduce: (measures, router weights, sorted slots, statistics, mask [T] or None, group of
            every token or [T] int64, rows per tile) adds to the statistics, in place.
        written: dtype `combine` writes sums of a dtype in.
    """

    sort: Sort
    combine: Combine
    reduce: Reduce
    written: Callable[[torch.dtype], torch.dtype]
