"""Measures each layer for the report: load, cut, margin and routing mass, as numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import Plan
from reap_driver.planning.retained import retained
from reap_kernels import SaliencyStats

# Experts whose score differs from the cut by less than this share are near it.
NEAR = 0.05


@dataclass(frozen=True)
class Cut:
    """Where a plan cuts one layer.

    Attributes:
        kept: bool [E], experts that are kept.
        score: the score at the cut: with K experts kept, the mean of the K-th and the next best
            score; the lowest score where all are kept.
        gap: (K-th best - next best) / K-th best; None where all are kept or the K-th best is 0.
        lowest_kept: id of the kept expert with the lowest score.
        highest_removed: id of the removed expert with the highest score; None where all are kept.
        order: int64 [E], ids, kept experts first, each side by descending score.
        near_kept: number of kept experts near the cut: inside the decision margin where that is
            known, else with a score less than `NEAR` above the cut.
        near_removed: number of removed experts near the cut, likewise.
        exceptions: number of removed experts that score above the cut; possible where a plan
            respects routing groups, protects experts, or was edited by hand.
    """

    kept: Tensor
    score: float
    gap: float | None
    lowest_kept: int
    highest_removed: int | None
    order: Tensor
    near_kept: int
    near_removed: int
    exceptions: int

    @classmethod
    def of(cls, scores: Tensor, kept: Sequence[int], doubtful: Sequence[int] | None) -> Cut:
        """The cut of one layer.

        Args:
            scores: float64 [E].
            kept: ids of the kept experts.
            doubtful: ids inside the decision margin; None where the margin is not known.
        """
        mask = torch.zeros(len(scores), dtype=torch.bool)
        mask[list(kept)] = True
        best = scores.sort(descending=True, stable=True)
        # Stable, so that of equal scores the lower id comes first, as in plans.
        order = best.indices[(~mask[best.indices]).sort(stable=True).indices]
        last = float(best.values[len(kept) - 1])
        after = float(best.values[len(kept)]) if len(kept) < len(scores) else last
        cut = (last + after) / 2
        if doubtful is None:
            close = (scores > cut * (1 - NEAR)) & (scores < cut * (1 + NEAR)) & (last > after)
        else:
            close = torch.zeros_like(mask)
            close[list(doubtful)] = True
        return cls(
            kept=mask,
            score=cut,
            gap=(last - after) / last if last > 0 and len(kept) < len(scores) else None,
            lowest_kept=int(order[len(kept) - 1]),
            highest_removed=int(order[len(kept)]) if len(kept) < len(scores) else None,
            order=order,
            near_kept=int((mask & close).sum()),
            near_removed=int((~mask & close).sum()),
            exceptions=int((~mask & (scores > cut)).sum()),
        )

    @property
    def near(self) -> int:
        """Number of experts near the cut, on both sides."""
        return self.near_kept + self.near_removed


@dataclass(frozen=True)
class LayerMeasures:
    """One MoE layer.

    Attributes:
        name: qualified name of its experts module.
        label: its number in the model, shown on the page.
        scores: float64 [E].
        count: int64 [E], rows routed to each expert.
        mass: float64 [G, E], sum of the router weights of each expert in each calibration group.
        cut: the plan's cut; None without a plan.
        retained: share of the routing mass on kept experts; None without a plan.
        retained_by_group: the same for each calibration group; empty without a plan.
        n_group: routing groups, consecutive runs of E / n_group ids; 1 without routing groups.
    """

    name: str
    label: str
    scores: Tensor
    count: Tensor
    mass: Tensor
    cut: Cut | None
    retained: float | None
    retained_by_group: list[float]
    n_group: int

    @property
    def experts(self) -> int:
        """E."""
        return len(self.scores)

    @cached_property
    def load(self) -> Tensor:
        """Rows of each expert over the layer's mean, float64 [E]; 1 is an even load."""
        return self.count.double() / self.count.double().mean().clamp(min=1e-300)

    @property
    def dead(self) -> int:
        """Number of experts that no row was routed to."""
        return int((self.count == 0).sum())

    @property
    def max_load(self) -> float:
        """The busiest expert's load over the mean."""
        return float(self.load.max())

    @cached_property
    def gini(self) -> float:
        """Gini coefficient of the load: 0 if it is even, (E - 1) / E if one expert has it all."""
        ascending = self.load.sort().values
        ranks = torch.arange(1, len(ascending) + 1, dtype=torch.float64)
        return float((2 * ranks - len(ascending) - 1) @ ascending / len(ascending) ** 2)

    @cached_property
    def shares(self) -> Tensor:
        """Each expert's share of each group's routing mass, float64 [G, E]; rows sum to 1."""
        return self.mass / self.mass.sum(1, keepdim=True).clamp(min=1e-300)


def measure(
    stats: SaliencyStats,
    scores: Scores,
    plan: Plan | None,
    doubtful: Mapping[str, Sequence[int]] | None = None,
) -> list[LayerMeasures]:
    """The measures of every layer, in the model's order.

    Args:
        stats: observed statistics.
        scores: scores of the same layers.
        plan: which experts are kept, with the same layers and numbers of experts; or None.
        doubtful: layer -> experts inside the decision margin; None where it is not known.
    """
    whole = {} if plan is None else retained(stats, plan)
    single = [] if plan is None else [retained(one, plan) for one in _single_groups(stats)]
    labels = labels_of(list(stats.layers))
    return [
        LayerMeasures(
            name=name,
            label=label,
            scores=scores[name],
            count=layer.count.sum(0),
            mass=layer.router_weight_sum,
            cut=None if plan is None else _cut(scores, plan, name, doubtful),
            retained=None if plan is None else whole[name].router_weight_share,
            retained_by_group=[of_group[name].router_weight_share for of_group in single],
            n_group=int(scores.layers.get(name, {}).get("n_group") or 1),
        )
        for (name, layer), label in zip(stats.layers.items(), labels, strict=True)
    ]


def _cut(
    scores: Scores, plan: Plan, name: str, doubtful: Mapping[str, Sequence[int]] | None
) -> Cut:
    known = None if doubtful is None else doubtful.get(name, ())
    return Cut.of(scores[name], plan.layers[name].kept, known)


def _single_groups(stats: SaliencyStats) -> list[SaliencyStats]:
    """The statistics of each calibration group by itself."""
    found = []
    for number, group in enumerate(stats.groups):
        targets = [0 if other == number else None for other in range(len(stats.groups))]
        layers = {name: layer.regrouped(targets, 1) for name, layer in stats.layers.items()}
        found.append(SaliencyStats(layers, [group]))
    return found


def labels_of(names: Sequence[str]) -> list[str]:
    """The number in each name (`3` of model.layers.3.mlp.experts); the positions instead, if a
    number is missing or repeats.
    """
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    numbers = [match[1] for match in found if match]
    if len(set(numbers)) == len(names):
        return numbers
    return [str(position) for position in range(len(names))]
