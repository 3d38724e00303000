"""What a report shows of each layer: load, cut, margin, routing mass. Numbers only, no pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reap_driver.evaluation.routing import retained
from reap_driver.plan.criteria import Scores
from reap_driver.plan.plan import Plan
from reap_kernels import SaliencyStats

# Experts whose score is within this share of the cut could change sides by little.
NEAR = 0.05


@dataclass(frozen=True)
class Cut:
    """Where a plan cuts one layer.

    Attributes:
        kept: bool [E], experts that stay.
        score: the score between those that stay and those that go: the mean of the K-th and the
            next best score, with K experts kept; the lowest score where all stay.
        gap: (K-th best - next best) / K-th best; None where all stay or the K-th best scored 0.
        lowest_kept: id of the worst expert that stays.
        highest_removed: id of the best expert that goes; None where all stay.
        order: ids [E], kept experts first, by descending score on either side.
        near_kept: kept experts whose place is in doubt: inside the decision margin where that is
            known, else those that score less than `NEAR` above the cut.
        near_removed: removed experts in doubt, or less than `NEAR` below the cut.
        exceptions: removed experts that score above the cut; a plan may have reasons for some
            (routing groups, protected experts, an edit by hand).
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
        """Of the scores [E] of a layer, the ids it keeps, and those inside the decision margin;
        None where that is not known.
        """
        mask = torch.zeros(len(scores), dtype=torch.bool)
        mask[list(kept)] = True
        best = scores.sort(descending=True, stable=True)
        # Stable: of equal scores the lower index comes first, as plans have it.
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
        """Experts in doubt, or close to the cut, on either side."""
        return self.near_kept + self.near_removed


@dataclass(frozen=True)
class LayerMeasures:
    """One MoE layer.

    Attributes:
        name: qualified name of its experts module.
        label: short name: its number in the model.
        scores: float64 [E].
        count: int64 [E], rows routed to each expert.
        mass: float64 [G, E], sum of the gate weights each expert got from each calibration group.
        cut: of the plan; None without one.
        retained: share of the routing mass that the plan's experts have; None without a plan.
        retained_by_group: the same of each calibration group's mass; empty without a plan.
        n_group: routing groups, consecutive runs of as many ids; 1 for none.
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
        """Rows of each expert over the mean of the layer, float64 [E]: 1 is an even load."""
        return self.count.double() / self.count.double().mean().clamp(min=1e-300)

    @property
    def dead(self) -> int:
        """Experts that no row was routed to."""
        return int((self.count == 0).sum())

    @property
    def max_load(self) -> float:
        """The busiest expert's load over the mean."""
        return float(self.load.max())

    @cached_property
    def gini(self) -> float:
        """Gini coefficient of the load: 0 for an even one, (E - 1) / E when one expert has all."""
        ascending = self.load.sort().values
        ranks = torch.arange(1, len(ascending) + 1, dtype=torch.float64)
        return float((2 * ranks - len(ascending) - 1) @ ascending / len(ascending) ** 2)

    @cached_property
    def shares(self) -> Tensor:
        """Share of each group's routing mass that each expert has, float64 [G, E]."""
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
        scores: of the same layers.
        plan: which experts stay, of the same layers and numbers of experts; None for none.
        doubtful: layer -> experts inside the decision margin; None where that is not known.
    """
    whole = {} if plan is None else retained(stats, plan)
    single = [] if plan is None else [retained(one, plan) for one in _single_groups(stats)]
    labels = _labels(list(stats.layers))
    return [
        LayerMeasures(
            name=name,
            label=label,
            scores=scores[name],
            count=layer.count.sum(0),
            mass=layer.router_weight_sum,
            cut=None if plan is None else _cut(scores, plan, name, doubtful),
            retained=None if plan is None else whole[name].gate_share,
            retained_by_group=[of_group[name].gate_share for of_group in single],
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


def _labels(names: Sequence[str]) -> list[str]:
    """The number in each name (`3` of model.layers.3.mlp.experts), or the position where numbers
    are missing or repeat.
    """
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    numbers = [match[1] for match in found if match]
    if len(set(numbers)) == len(names):
        return numbers
    return [str(position) for position in range(len(names))]
