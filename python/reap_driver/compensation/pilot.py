"""Chooses the ridge of a re-fit on a part of the rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reap_driver.compensation.gradients import Problem, Total
from reap_driver.compensation.rows import Rows
from reap_kernels import ExpertWeights, LayerGram

# Ridges that are tried, relative to the mean of the diagonals of the Gram matrices.
_RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
# Of the batches that are fitted, every n-th is fitted with all ridges.
_EVERY = 4


class RefitSums:
    """Gram matrices of the rows to re-fit a layer with, summed while the layer runs.

    Args:
        num_experts, intermediate_size: of the layer.
        held_out: whether each batch is held out.
        device: where the sums are.

    Example:
        >>> sums = RefitSums(8, 16, [False, False, True])
        >>> sums.of(2) is None  # a held-out batch adds to none
        True
    """

    def __init__(
        self,
        num_experts: int,
        intermediate_size: int,
        held_out: Sequence[bool],
        device: torch.device | str = "cpu",
    ) -> None:
        self._held_out = tuple(held_out)
        fitted = [number for number, held in enumerate(held_out) if not held]
        self.pilot_numbers = fitted[::_EVERY]
        self.held_numbers = [number for number, held in enumerate(held_out) if held]
        self.pilot, self.rest = (
            LayerGram(num_experts, intermediate_size, device) for _ in range(2)
        )

    def of(self, number: int) -> LayerGram | None:
        """The sums that a batch adds to; None for one that is held out."""
        if self._held_out[number]:
            return None
        return self.pilot if number in self.pilot_numbers else self.rest


@dataclass(frozen=True)
class Pilot:
    """The choice of a layer's ridge.

    All ridges are tried at once: in place of the layer's output rows there are blocks of them, each
    the same random projection of what is missing, solved with one of the ridges. So the cost is
    that of a single solution, of a part of the rows. A ridge stands for the ratio of noise to
    signal, not for the number of rows, so in absolute terms it is the same for all of them.

    Attributes:
        experts, rows, sums, steps, total, backend: see `reap_driver.compensation.refit.solve`.
        mean: what ridges are relative to.
    """

    experts: ExpertWeights
    rows: Rows
    sums: RefitSums
    mean: float
    steps: int
    total: Total
    backend: str | None

    def ridge(self, right: Tensor) -> float:
        """The ridge of the least error on held-out batches.

        Args:
            right: float32 [E, H, I], the sum of g m h^T over this rank's rows of the pilot.
        """
        hidden = self.experts.hidden_size
        ridges = _RIDGES[-min(len(_RIDGES), hidden) :]
        width = hidden // len(ridges)
        projection = _projection(hidden, width, len(ridges)).to(right.device)
        block = torch.arange(hidden, device=right.device) // width
        block = block.clamp(max=len(ridges) - 1)  # rows left over are 0
        numbers = [*self.sums.pilot_numbers, *self.sums.held_numbers]
        rows = [self.rows[number] for number in numbers]
        rows = [replace(batch, missing=batch.missing @ projection) for batch in rows]
        scaled = [ridge * self.mean for ridge in ridges]
        problem = Problem(
            self.experts, rows, self.sums.pilot, scaled, block, self.total, self.backend
        )
        projected = torch.matmul(projection.T, right)
        self.total([projected])
        problem.solve(self.steps, projected)
        left = torch.zeros(hidden, dtype=torch.float64, device=right.device)
        for batch in rows:
            if batch.held_out:
                left += batch.squares(batch.missing)
        self.total([left])
        errors = torch.zeros(len(ridges), dtype=torch.float64, device=left.device)
        return least(ridges, errors.index_add_(0, block, left).tolist())


def least(ridges: Sequence[float], errors: Sequence[float]) -> float:
    """The ridge of the least error: the lowest point of a parabola, over logarithms, through the
    best ridge and its neighbors; the best one where it has none on one side.

    Example:
        >>> round(least([0.01, 0.1, 1.0], [2.0, 1.0, 2.0]), 3)
        0.1
    """
    best = min(range(len(errors)), key=errors.__getitem__)
    if not 0 < best < len(errors) - 1:
        return ridges[best]
    x = [math.log(ridges[i]) for i in range(best - 1, best + 2)]
    y = errors[best - 1 : best + 2]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    if right <= left:  # all three are equal
        return ridges[best]
    lowest = (x[0] + x[1]) / 2 - left * (x[2] - x[0]) / 2 / (right - left)
    return math.exp(min(max(lowest, x[0]), x[2]))


def _projection(hidden: int, width: int, times: int) -> Tensor:
    """[hidden, hidden] float32: a random projection to `width` columns, `times` times, then 0."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(hidden, width, generator=generator) / width**0.5
    found = torch.zeros(hidden, hidden)
    found[:, : times * width] = one.repeat(1, times)
    return found
