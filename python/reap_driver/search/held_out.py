"""Whether a searched plan is better than the uniform one on text that the search never saw."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.plan import Plan
from reap_driver.router_mask import RouterMasks
from reap_driver.search.fitness import Inputs, acceptance_by_sequence
from reap_kernels.errors import DataError

_DRAWS = 2000
_TAIL = 0.025  # on either side of a 95 % interval


@dataclass(frozen=True)
class HeldOut:
    """Expected acceptance of two plans on the same sequences.

    Attributes:
        sequences: how many.
        predictions: counted in them.
        uniform: acceptance of the uniform plan, the mean over predictions.
        searched: that of the searched plan.
        low, high: 95 % interval of searched - uniform, by a bootstrap over sequences.
    """

    sequences: int
    predictions: int
    uniform: float
    searched: float
    low: float
    high: float

    @property
    def lost(self) -> bool:
        """Whether the searched plan is worse."""
        return self.searched < self.uniform


def held_out(
    model: PreTrainedModel,
    batches: Sequence[Inputs],
    uniform: Plan,
    searched: Plan,
    *,
    masks: RouterMasks | None = None,
    seed: int = 0,
) -> HeldOut:
    """Compares two plans on sequences they were not searched on.

    Args:
        model: the full model, in memory.
        batches: arguments of its forward.
        uniform, searched: the plans.
        masks: of this model, where there are any already.
        seed: of the bootstrap.

    Raises:
        DataError: nothing in the batches counts; or logits are not finite.
    """
    plans = [uniform.kept, searched.kept]
    sums, counts = acceptance_by_sequence(model, batches, plans, masks)
    if not counts.sum():
        raise DataError(
            "none of the tokens that are held out is a prediction that counts; give more data, or "
            "--validation 0"
        )
    total = int(counts.sum())
    first, second = (sums.sum(dim=1) / total).tolist()
    low, high = _interval(sums[1] - sums[0], counts, Random(f"reap-held-out {seed}"))
    return HeldOut(len(counts), total, first, second, low, high)


def _interval(gains: Tensor, counts: Tensor, draw: Random) -> tuple[float, float]:
    """Where the mean gain a prediction lies, were other sequences of this kind drawn.

    Args:
        gains: float64 [S], a sequence each.
        counts: int64 [S], its predictions.
        draw: of the sequences.
    """
    rows = [int(draw.random() * len(counts)) for _ in range(_DRAWS * len(counts))]
    drawn = torch.tensor(rows).view(_DRAWS, len(counts))
    means = (gains[drawn].sum(dim=1) / counts[drawn].sum(dim=1)).sort().values
    return float(means[round(_TAIL * _DRAWS)]), float(means[round((1 - _TAIL) * _DRAWS) - 1])
