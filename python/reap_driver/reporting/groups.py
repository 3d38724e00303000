"""Compares calibration groups: their specialists, and what other group weights would keep."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from reap_driver.planning.criteria import Scores
from reap_driver.planning.public_provenance import live_mode
from reap_driver.planning.scoring import score
from reap_driver.planning.stability import rank_correlation
from reap_driver.reporting.elements import Cell, Paragraph, Part, Share, Table
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.measures import LayerMeasures

# With fewer rows, an expert's distribution over groups is too uncertain to call it a specialist.
_ENOUGH = 100
_EACH = 3  # specialists shown of each group


@dataclass(frozen=True)
class Specialist:
    """An expert whose routing mass comes mostly from one group.

    Attributes:
        layer: label of its layer.
        expert: its id.
        group: the group it serves.
        part: the group's share of the expert's routing mass, groups weighted equally; in [0, 1].
        share: the expert's share of the group's routing mass in that layer; in [0, 1].
        rows: rows (token, slot) routed to it, all groups together.
        kept: whether the plan keeps it; None without a plan.
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
    """How a plan of the same size would differ if groups had other weights.

    Attributes:
        name: name of the weighting.
        changed: kept experts that would be replaced by others, over all layers.
        kept: experts kept, over all layers.
        worst: label of the layer where the largest share of kept experts would be replaced.
        worst_share: that share.
    """

    name: str
    changed: int
    kept: int
    worst: str
    worst_share: float


def parts(layer: LayerMeasures) -> Tensor:
    """Each group's share of every expert's routing mass, groups weighted equally: float64 [G, E].

    p_g(e) / sum_g p_g(e), where p_g(e) is the expert's share of group g's mass. Columns sum to 1,
    or to 0 where no row was routed to the expert.
    """
    return layer.shares / layer.shares.sum(0).clamp(min=1e-300)


def threshold(num_groups: int) -> float:
    """The part from which on an expert is a group's specialist: 0.75 with two groups, 0.5 with
    more.
    """
    return 0.75 if num_groups == 2 else 0.5


def specialized(layer: LayerMeasures) -> Tensor:
    """bool [G, E]: which experts are specialists of which group; experts with few rows are not."""
    enough = layer.count >= _ENOUGH
    return (parts(layer) >= threshold(len(layer.mass))) & enough


def most_specialized(
    layers: Sequence[LayerMeasures], groups: Sequence[str], each: int
) -> list[Specialist]:
    """Of each group, the `each` specialists with the largest share of its mass, in group order."""
    found: dict[str, list[Specialist]] = {group: [] for group in groups}
    for layer in layers:
        part, share = parts(layer), layer.shares
        for number, expert in specialized(layer).nonzero().tolist():
            found[groups[number]].append(
                Specialist(
                    layer=layer.label,
                    expert=expert,
                    group=groups[number],
                    part=float(part[number, expert]),
                    share=float(share[number, expert]),
                    rows=int(layer.count[expert]),
                    kept=None if layer.cut is None else bool(layer.cut.kept[expert]),
                )
            )
    return [one for every in found.values() for one in sorted(every, key=lambda s: -s.share)[:each]]


def reweighted(layers: Sequence[LayerMeasures], scores: Mapping[str, Scores]) -> list[Reweighted]:
    """How the kept experts would change under other scores, with as many kept in every layer.

    Args:
        layers: measures with the plan's cut.
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
    """Ids with the best scores, as many in each routing group as `kept` has.

    Args:
        scores: float64 [E].
        kept: bool [E].
        n_group: routing groups, consecutive runs of E / n_group ids.
    """
    size = len(scores) // n_group
    found = []
    for start in range(0, size * n_group, size):
        ranked = scores[start : start + size].sort(descending=True, stable=True).indices
        number = int(kept[start : start + size].sum())
        found += [start + index for index in ranked[:number].tolist()]
    return found


def group_parts(inputs: Inputs) -> list[Part]:
    """Specialists, correlation of scores between groups, and what other weights would keep."""
    groups = inputs.stats.groups
    if len(groups) < 2:
        live = live_mode(inputs.stats.provenance) is not None
        how = (
            "start the observation with their names, and name one in the header X-Reap-Group of "
            "each request"
            if live
            else "name the groups when observing (--data GROUP=SOURCE)"
        )
        return [
            Paragraph(
                f"All data are in one group ({groups[0]}). To see which experts serve which group, "
                f"{how}."
            )
        ]
    return [_specialist_table(inputs), _correlation_table(inputs), *_reweighted_table(inputs)]


def _specialist_table(inputs: Inputs) -> Part:
    found = most_specialized(inputs.layers, inputs.stats.groups, _EACH)
    if not found:
        return Paragraph("No expert is a specialist of one group.")
    headings = ["group", "layer", "expert", "part of its mass", "share of the group's mass", "rows"]
    rows: list[list[Cell]] = [
        [one.group, one.layer, one.expert, Share(one.part), Share(one.share), one.rows]
        for one in found
    ]
    if inputs.cutting is not None:
        headings.append("plan")
        for row, one in zip(rows, found, strict=True):
            row.append("kept" if one.kept else "removed")
    caption = f"Specialists with the largest share of their group's mass, up to {_EACH} per group"
    return Table(caption, headings, rows)


def _correlation_table(inputs: Inputs) -> Part:
    scores = inputs.single_groups
    if not scores:
        return Paragraph(
            "Not every group reached every layer, so groups cannot be scored by themselves; "
            "observe more data of each group to compare them."
        )
    means: dict[frozenset[str], float] = {}
    for one, other in itertools.combinations(scores, 2):
        by_layer = rank_correlation(scores[one], scores[other])
        means[frozenset((one, other))] = sum(by_layer.values()) / len(by_layer)
    rows: list[list[Cell]] = [
        [one, *(1.0 if one == other else means[frozenset((one, other))] for other in scores)]
        for one in scores
    ]
    caption = "Rank correlation of scores between groups, mean over layers (1: the same order)"
    return Table(caption, ["group", *scores], rows, stacked=False)


def _reweighted_table(inputs: Inputs) -> list[Part]:
    if inputs.cutting is None or not inputs.single_groups:
        return []
    weightings = {f"{group} alone": scores for group, scores in inputs.single_groups.items()}
    equal = dict.fromkeys(inputs.stats.groups, 1.0)
    weightings["all groups equal"] = score(inputs.stats, inputs.scores.criterion, equal)
    rows: list[list[Cell]] = [
        [
            one.name,
            one.changed,
            Share(one.changed / one.kept),
            one.worst,
            Share(one.worst_share),
        ]
        for one in reweighted(inputs.layers, weightings)
    ]
    caption = "Experts that other group weights would keep instead, with as many kept per layer"
    headings = ["weights", "experts replaced", "share of those kept", "most in layer", "its share"]
    return [Table(caption, headings, rows)]
