"""Compares what a search found with the uniform plan on held-out text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.evaluation.figures import DRAWS, intervals
from reap_driver.plan_search.fitness import Candidate, Inputs, acceptance_by_sequence
from reap_kernels.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """Expected acceptance of the uniform and the searched plan on the same sequences.

    Attributes:
        sequences: number of sequences.
        predictions: number of counted predictions in them.
        uniform: expected acceptance of the uniform plan, the mean over predictions.
        searched: expected acceptance of the searched plan.
        low, high: 95 % interval of searched - uniform, by a bootstrap over sequences; None if
            there is only one sequence.
    """

    sequences: int
    predictions: int
    uniform: float
    searched: float
    low: float | None
    high: float | None

    @property
    def lost(self) -> bool:
        """Whether the searched plan is worse."""
        return self.searched < self.uniform

    def notes(self, against: str) -> list[str]:
        """The comparison in sentences, for plans and reports.

        Args:
            against: what the uniform plan is called there.
        """
        said = (
            f"expected acceptance on {self.sequences} held-out sequences {self.searched:.4f}, of "
            f"the {against} {self.uniform:.4f} (difference {self.searched - self.uniform:+.4f}"
        )
        if self.low is not None:
            said += f", 95 % interval {self.low:+.4f} to {self.high:+.4f}"
        said += ")"
        if not self.lost:
            return [said]
        return [
            said,
            f"the searched plan is worse than the {against} on held-out text: use the {against}, "
            "or search on more data",
        ]


def held_out(
    model: PreTrainedModel,
    batches: Sequence[Inputs],
    uniform: Candidate,
    searched: Candidate,
    *,
    seed: int = 0,
    backend: str | None = None,
) -> HeldOut:
    """Compares two plans on sequences that the search did not use.

    Args:
        model: the full model, in memory.
        batches: arguments of its forward.
        uniform, searched: contexts in which the model computes what each plan computes.
        seed: random seed of the bootstrap.
        backend: backend of `compare_logits`, without fallback; None for the best one.

    Raises:
        DataError: the batches contain no prediction that counts, or logits are not finite.
    """
    sums, counts = acceptance_by_sequence(model, batches, [uniform, searched], backend=backend)
    if not counts.sum():
        raise DataError(
            "the held-out sequences contain no prediction that counts; use more data, or "
            "`validation=0`"
        )
    total = int(counts.sum())
    first, second = (sums.sum(dim=1) / total).tolist()
    low, high = _interval(sums[1] - sums[0], counts, seed)
    return HeldOut(len(counts), total, first, second, low, high)


def _interval(gains: Tensor, counts: Tensor, seed: int) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the mean gain per prediction.

    Args:
        gains: float64 [S], the gain of each sequence, summed over its predictions.
        counts: int64 [S], the number of predictions of each sequence.
        seed: random seed of the bootstrap.
    """
    data, one = torch.stack([gains, counts.double()], dim=1), torch.zeros_like(counts)
    found = intervals(lambda totals: totals[:, :1] / totals[:, 1:], data, one, DRAWS, seed)
    return (None, None) if found is None else (float(found[0]), float(found[1]))
