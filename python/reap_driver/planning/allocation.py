"""How many experts each layer loses; pure functions of scores.

Three rules. `uniform` removes the same share of every layer. `pooled` ranks the experts of all
layers together, so layers whose experts matter less lose more. `explicit` takes the numbers as they
are given, which is what a search finds. Every rule leaves each router enough experts to choose from
and keeps protected experts. A router that chooses among groups of experts (n_group > 1) needs as
many experts in every group, so each group loses its own lowest scores, as many as every other.

`pooled` makes scores of different layers comparable first. A constant factor that a block applies
to the routed sum after its experts (`scale` of a layer's facts) is part of what an expert
contributes, so scores are multiplied by it. What the layers add to the residual stream still grows
with depth while the stream grows too, so raw scores would empty the first layers. By default each
layer's scores are therefore divided by their mean, which compares an expert with the others of its
layer (and cancels the factor).
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from reap_driver.planning.budget import (
    Budget,
    Router,
    check_ratio,
    floor_of,
    ranked,
    ratio_of,
    refusal,
)
from reap_kernels.errors import PlanError

NORMALIZATIONS = ("mean", "max", "none")


class _Unit(NamedTuple):
    """One step of removal from a layer: one expert, or one of each routing group. Sorted, the first
    are removed.

    Attributes:
        score: (mean) score of the removed experts.
        turn: steps of the same layer before this one.
        later: minus the position of the layer.
        name: the layer.
        size: experts removed.
    """

    score: float
    turn: int
    later: int
    name: str
    size: int


def uniform(
    layers: Mapping[str, Mapping[str, Any]],
    ratio: float,
    *,
    protected: Mapping[str, Collection[int]] | None = None,
    layer_ratios: Mapping[str, float] | None = None,
) -> list[Budget]:
    """Removes floor(E * ratio) experts of every layer, rounded down to equal routing groups.

    Args:
        layers: per layer `num_experts`, `top_k` and, where the router has groups, `n_group` and
            `topk_group`, as the provenance of statistics records them.
        ratio: share of experts to remove, 0 < ratio < 1.
        protected: {layer: ids} that stay. The layer still loses as many.
        layer_ratios: {layer: ratio} of layers that lose another share; 0 keeps all of them. The
            other layers lose `ratio` all the same.

    Raises:
        PlanError: a ratio is out of range, removes nothing, or leaves a router fewer experts than
            it chooses; the message names the layer, the numbers and the largest ratio that works.
    """
    check_ratio(ratio)
    if not layers:
        raise PlanError("there is no layer to plan; observe the model first")
    guarded, own = protected or {}, layer_ratios or {}
    return [
        share(Router.of(name, layer), own.get(name, ratio), frozenset(guarded.get(name, ())))
        for name, layer in layers.items()
    ]


def share(router: Router, ratio: float, protected: frozenset[int]) -> Budget:
    """The budget of one layer that loses a share of its experts; 0 for none.

    Raises:
        PlanError: the ratio removes no whole expert, or too many.
    """
    if ratio == 0:
        return router.losing(0, protected)
    check_ratio(ratio)
    experts, step = router.num_experts, router.n_group
    asked = floor_of(experts, ratio)
    removed = asked // step * step
    unit = f"{step} routing groups of equal size" if step > 1 else "whole experts"
    problem = refusal(router, removed, protected) if removed else f"removes none ({unit})"
    if problem is None:
        return router.losing(removed, protected, asked)
    most = router.most(protected)
    remedy = "this model cannot lose experts"
    if most:
        remedy = f"use a ratio from {ratio_of(step, experts):g} to {ratio_of(most, experts):g}"
    elif router.most():
        remedy = "protect fewer of its experts, or give the layer the ratio 0"
    raise PlanError(
        f"ratio {ratio:g} of the {experts} experts of layer {router.name} {problem}; {remedy}"
    )


def pooled(
    scores: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Any]],
    ratio: float,
    *,
    protected: Mapping[str, Collection[int]] | None = None,
    layer_ratios: Mapping[str, float] | None = None,
    normalize: str = "mean",
) -> list[Budget]:
    """Removes floor(N * ratio) experts of the N in all layers: those with the lowest scores.

    A layer keeps the experts that its router needs, so fewer are removed where all layers are at
    that limit, or where the rest is less than one expert per routing group. Of equal scores, layers
    lose theirs in turn, the last layer first.

    Args:
        scores: {layer: float64 [E]}.
        layers: per layer its facts, as the provenance of statistics records them; `scale` counts.
        ratio: share of experts to remove, 0 < ratio < 1.
        protected: {layer: ids} that stay.
        layer_ratios: {layer: ratio} of layers that lose that share instead of taking part; 0 keeps
            all of them.
        normalize: divide a layer's scores by their "mean" or "max", or "none".

    Raises:
        PlanError: a ratio is out of range or removes nothing, or there is no such normalization.
    """
    check_ratio(ratio)
    if normalize not in NORMALIZATIONS:
        raise PlanError(
            f"normalize {normalize!r} is unknown; choose one of {', '.join(NORMALIZATIONS)}"
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
            _comparable(scores[name], layers[name], normalize, name),
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


def _comparable(scores: Tensor, layer: Mapping[str, Any], normalize: str, name: str) -> Tensor:
    """Scores of a layer, made comparable with those of other layers; float64 [E]."""
    scores = scores * float(layer.get("scale", 1.0))
    by = {"mean": scores.mean(), "max": scores.max(), "none": scores.new_ones(())}[normalize]
    if by <= 0 and bool((scores != 0).any()):
        raise PlanError(
            f"normalize {normalize!r} would divide the scores of layer {name} by {float(by):g}, "
            "which turns or loses their order; use none, or scores above 0"
        )
    return scores / by if by > 0 else scores


def _units(router: Router, scores: Tensor, protected: frozenset[int], place: int) -> list[_Unit]:
    """The steps by which a layer can lose experts, in order."""
    # [n_group, E / n_group], lowest score first
    order = ranked(scores, router.n_group, protected).flip(-1)
    grouped = scores.unflatten(-1, (router.n_group, -1))
    score = grouped.gather(-1, order).mean(dim=0).tolist()
    turns = router.most(protected) // router.n_group
    return [_Unit(score[n], n, -place, router.name, router.n_group) for n in range(turns)]


def _lowest(units: list[_Unit], limit: int) -> dict[str, int]:
    """{layer: experts removed}: the units of the lowest scores, as many as fit into the limit."""
    removed: dict[str, int] = {}
    total = 0
    for unit in sorted(units):
        if total + unit.size <= limit:
            removed[unit.name] = removed.get(unit.name, 0) + unit.size
            total += unit.size
    return removed


def removal_steps(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """{layer: number that removals must be a multiple of}: its routing groups, or 1."""
    return {name: Router.of(name, layer).n_group for name, layer in layers.items()}


def max_removable(
    layers: Mapping[str, Mapping[str, Any]], protected: Mapping[str, Collection[int]] | None = None
) -> dict[str, int]:
    """{layer: largest number of experts that can be removed}, a multiple of its step; perhaps 0.

    Args:
        layers: per layer its facts, as the provenance of statistics records them.
        protected: {layer: ids} that stay.
    """
    guarded = protected or {}
    return {
        name: Router.of(name, layer).most(guarded.get(name, ())) for name, layer in layers.items()
    }


def explicit(
    layers: Mapping[str, Mapping[str, Any]],
    removals: Mapping[str, int],
    *,
    protected: Mapping[str, Collection[int]] | None = None,
) -> list[Budget]:
    """Budgets of given removals.

    Args:
        layers: per layer its facts, as the provenance of statistics records them.
        removals: {layer: experts to remove}, one for every layer.
        protected: {layer: ids} that stay.

    Raises:
        PlanError: the removals name other layers, a layer cannot lose that many, or its routing
            groups would differ in size.
    """
    unknown, missing = sorted(set(removals) - set(layers)), sorted(set(layers) - set(removals))
    if unknown or missing:
        raise PlanError(
            f"removals name {unknown or 'no'} layers that there are not, and leave out {missing}; "
            "give each MoE layer a number (0 keeps it whole)"
        )
    guarded = protected or {}
    budgets = []
    for name, layer in layers.items():
        router, kept = Router.of(name, layer), frozenset(guarded.get(name, ()))
        budgets.append(_explicit_budget(router, removals[name], kept))
    return budgets


def _explicit_budget(router: Router, removed: int, protected: frozenset[int]) -> Budget:
    problem = refusal(router, removed, protected)
    if removed < 0:
        problem = "is no number of experts"
    elif removed % router.n_group:
        problem = f"is no multiple of its {router.n_group} routing groups"
    if problem is not None:
        raise PlanError(
            f"removing {removed} of the {router.num_experts} experts of layer {router.name} "
            f"{problem}; remove from 0 to {router.most(protected)}"
            + (f" in steps of {router.n_group}" if router.n_group > 1 else "")
        )
    return router.losing(removed, protected)
