"""The experts of all layers ranked together: layers whose experts matter less lose more.

Scores of different layers are made comparable first. A constant factor that a block applies to the
routed sum after its experts (`scale` of a layer's facts) is part of what an expert contributes, so
scores are multiplied by it. What the layers add to the residual stream still grows with depth while
the stream grows too, so raw scores would empty the first layers; by default each layer's scores are
divided by their mean, and what is compared is an expert's worth beside that of its neighbours. (The
factor then cancels.)
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from reap_driver.plan.allocation.budget import (
    Budget,
    Router,
    check_ratio,
    floor_of,
    ranked,
    ratio_of,
)
from reap_driver.plan.allocation.uniform import share
from reap_kernels.errors import PlanError

NORMALISATIONS = ("mean", "max", "none")


class _Unit(NamedTuple):
    """One removal from a layer, in the order of removal: an expert, or one of each routing group.

    Attributes:
        worth: what is lost: the (mean) score.
        turn: how many removals the layer has made before it.
        later: minus the position of the layer.
        name: the layer.
        size: experts removed.
    """

    worth: float
    turn: int
    later: int
    name: str
    size: int


def pooled(
    scores: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Any]],
    ratio: float,
    *,
    protected: Mapping[str, Collection[int]] | None = None,
    layer_ratios: Mapping[str, float] | None = None,
    normalise: str = "mean",
) -> list[Budget]:
    """Removes floor(N * ratio) experts of the N in all layers: those with the lowest scores.

    A layer never loses more than its router can spare, so fewer go where all layers are at that
    limit, or where what is left to remove is less than one expert of every routing group. Between
    equal scores layers take turns, the last layer first.

    Args:
        scores: {layer: float64 [E]}.
        layers: per layer its facts, as the provenance of statistics records them; `scale` counts.
        ratio: share of experts to remove, 0 < ratio < 1.
        protected: {layer: ids} that stay.
        layer_ratios: {layer: ratio} of layers that lose that share instead of taking part; 0 keeps
            all of them.
        normalise: divide a layer's scores by their "mean" or "max", or "none".

    Raises:
        PlanError: a ratio is out of range or removes nothing, or there is no such normalisation.
    """
    check_ratio(ratio)
    if normalise not in NORMALISATIONS:
        raise PlanError(
            f"normalise {normalise!r} is unknown; choose one of {', '.join(NORMALISATIONS)}"
        )
    if not layers:
        raise PlanError("there is no layer to plan; observe the model first")
    guarded, own = protected or {}, layer_ratios or {}
    routers = {name: Router.of(name, layer) for name, layer in layers.items()}
    kept = {name: frozenset(guarded.get(name, ())) for name in layers}
    pool = [name for name in layers if name not in own]
    units = [
        unit
        for place, name in enumerate(pool)
        for unit in _units(
            routers[name],
            _comparable(scores[name], layers[name], normalise, name),
            kept[name],
            place,
        )
    ]
    removed = _lowest(units, removal_target(layers, ratio, own))
    if pool and not removed:
        experts = sum(routers[name].num_experts for name in pool)
        remedy = "protect fewer experts, or leave the model as it is: no router can spare any"
        if units:
            least = ratio_of(min(unit.size for unit in units), experts)
            remedy = f"use a ratio of {least:g} or more"
        raise PlanError(
            f"ratio {ratio:g} of the {experts} experts of all layers removes none; {remedy}"
        )
    return [
        share(router, own[name], kept[name])
        if name in own
        else router.losing(removed.get(name, 0), kept[name])
        for name, router in routers.items()
    ]


def removal_target(
    layers: Mapping[str, Mapping[str, Any]], ratio: float, layer_ratios: Mapping[str, float]
) -> int:
    """floor(N * ratio) of the N experts in the layers without a ratio of their own."""
    pool = (facts for name, facts in layers.items() if name not in layer_ratios)
    return floor_of(sum(int(facts["num_experts"]) for facts in pool), ratio)


def _comparable(scores: Tensor, layer: Mapping[str, Any], normalise: str, name: str) -> Tensor:
    """Scores of a layer as they compare with other layers', float64 [E]."""
    scores = scores * float(layer.get("scale", 1.0))
    by = {"mean": scores.mean(), "max": scores.max(), "none": scores.new_ones(())}[normalise]
    if by <= 0 and bool((scores != 0).any()):
        raise PlanError(
            f"normalise {normalise!r} would divide the scores of layer {name} by {float(by):g}, "
            "which turns or loses their order; use none, or scores above 0"
        )
    return scores / by if by > 0 else scores


def _units(router: Router, scores: Tensor, protected: frozenset[int], place: int) -> list[_Unit]:
    """What a layer can lose, in order."""
    order = ranked(scores, router.n_group, protected).flip(
        -1
    )  # [n_group, E / n_group], worst first
    grouped = scores.unflatten(-1, (router.n_group, -1))
    worth = grouped.gather(-1, order).mean(dim=0).tolist()
    turns = router.most(protected) // router.n_group
    return [_Unit(worth[n], n, -place, router.name, router.n_group) for n in range(turns)]


def _lowest(units: list[_Unit], limit: int) -> dict[str, int]:
    """{layer: experts removed}: units of the lowest worth, as many as fit."""
    removed: dict[str, int] = {}
    total = 0
    for unit in sorted(units):
        if total + unit.size <= limit:
            removed[unit.name] = removed.get(unit.name, 0) + unit.size
            total += unit.size
    return removed
