"""Calibration groups against each other: who serves which, and what other weights would keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from reap_driver.plan.criteria import Scores
from reap_driver.reporting.measures import LayerMeasures

# Rows below which an expert's distribution over groups says little.
_ENOUGH = 100


@dataclass(frozen=True)
class Specialist:
    """An expert that works mostly for one group.

    Attributes:
        layer: label of its layer.
        expert: its id.
        group: whom it serves.
        part: the group's part of what the expert does, groups counted alike.
        share: of the group's routing mass in that layer.
        rows: routed to it, all groups together.
        kept: by the plan; None without one.
    """

    layer: str
    expert: int
    group: str
    part: float
    share: float
    rows: int
    kept: bool | None


@dataclass(frozen=True)
class Reweighted:
    """What a plan of the same size would keep if groups counted otherwise.

    Attributes:
        name: of the weighting.
        changed: kept experts that would go, and as many others stay, in all layers.
        kept: experts kept in all layers.
        worst: label of the layer with most changes, relative to its kept experts.
        worst_share: of its kept experts that would go.
    """

    name: str
    changed: int
    kept: int
    worst: str
    worst_share: float


def parts(layer: LayerMeasures) -> Tensor:
    """Each group's part of every expert's routing mass, groups counted alike: float64 [G, E].

    p_g(e) / sum_g p_g(e), with p_g(e) the expert's share of group g's mass. Columns sum to 1, or to
    0 where no row was routed.
    """
    return layer.shares / layer.shares.sum(0).clamp(min=1e-300)


def threshold(num_groups: int) -> float:
    """The part from which an expert counts as a group's specialist: three quarters of two groups,
    half of more.
    """
    return 0.75 if num_groups == 2 else 0.5


def specialised(layer: LayerMeasures) -> Tensor:
    """bool [G, E]: which experts are specialists of which group, of those with enough rows."""
    enough = layer.count >= _ENOUGH
    return (parts(layer) >= threshold(len(layer.mass))) & enough


def most_specialised(
    layers: Sequence[LayerMeasures], groups: Sequence[str], each: int
) -> list[Specialist]:
    """Of each group, the `each` specialists that carry most of its mass, in the groups' order."""
    found = []
    for number, group in enumerate(groups):
        of_group = [
            Specialist(
                layer=layer.label,
                expert=expert,
                group=group,
                part=float(parts(layer)[number, expert]),
                share=float(layer.shares[number, expert]),
                rows=int(layer.count[expert]),
                kept=None if layer.cut is None else bool(layer.cut.kept[expert]),
            )
            for layer in layers
            for expert in specialised(layer)[number].nonzero().flatten().tolist()
        ]
        found += sorted(of_group, key=lambda one: -one.share)[:each]
    return found


def reweighted(layers: Sequence[LayerMeasures], scores: Mapping[str, Scores]) -> list[Reweighted]:
    """What each of the scorings would keep in place of the plan's experts, layer by layer as many.

    Args:
        layers: with the plan's cut.
        scores: name of a weighting -> its scores.
    """
    rows = []
    for name, other in scores.items():
        changes = []
        for layer in layers:
            assert layer.cut is not None
            number = int(layer.cut.kept.sum())
            best = best_as_many(other[layer.name], layer.cut.kept, layer.n_group)
            changes.append((number - int(layer.cut.kept[best].sum()), number, layer.label))
        lost, number, label = max(changes, key=lambda change: change[0] / change[1])
        rows.append(
            Reweighted(
                name=name,
                changed=sum(change[0] for change in changes),
                kept=sum(change[1] for change in changes),
                worst=label,
                worst_share=lost / number,
            )
        )
    return rows


def best_as_many(scores: Tensor, kept: Tensor, n_group: int) -> list[int]:
    """Ids with the best scores [E], as many in each routing group as `kept` [E] has."""
    size = len(scores) // n_group
    found = []
    for start in range(0, size * n_group, size):
        ranked = scores[start : start + size].sort(descending=True, stable=True).indices
        number = int(kept[start : start + size].sum())
        found += [start + index for index in ranked[:number].tolist()]
    return found
