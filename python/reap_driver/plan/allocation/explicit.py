"""Removals given layer by layer, as a search finds them, and what such numbers can be."""

from collections.abc import Collection, Mapping
from typing import Any

from reap_driver.plan.allocation.budget import Budget, Router, refusal
from reap_kernels.errors import PlanError


def removal_steps(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Of each layer, the number that removals are multiples of: its routing groups, or 1."""
    return {name: Router.of(name, layer).n_group for name, layer in layers.items()}


def max_removable(
    layers: Mapping[str, Mapping[str, Any]], protected: Mapping[str, Collection[int]] | None = None
) -> dict[str, int]:
    """Of each layer, the most experts that may go, a multiple of its step; 0 where none may.

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
        PlanError: the removals are not of these layers, a layer cannot lose that many, its routing
            groups would differ in size, or nothing is removed at all.
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
        budgets.append(_budget(router, removals[name], kept))
    if not any(budget.removed for budget in budgets):
        raise PlanError("removals are 0 in every layer; remove at least one expert")
    return budgets


def _budget(router: Router, removed: int, protected: frozenset[int]) -> Budget:
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
