"""The same share of every layer, as whole experts, or a share of its own."""

from collections.abc import Collection, Mapping
from typing import Any

from reap_driver.plan.allocation.budget import (
    Budget,
    Router,
    check_ratio,
    floor_of,
    ratio_of,
    refusal,
)
from reap_kernels.errors import PlanError


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
    """What one layer loses by a ratio; 0 for nothing.

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
