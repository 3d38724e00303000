"""Allocation: how many experts each layer loses, and which; a pure function of scores.

Removed per layer = floor(E * ratio), as published checkpoints count (288 experts at 40 % keep 173).
Routers that choose among groups of experts (n_group > 1) need as many experts in every group, so
the number is rounded down to a multiple of n_group and each group loses its own lowest: never more
is removed than was asked for. Among equal scores the lower index stays.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reap_kernels.errors import PlanError

# Serving engines build their kernels for these numbers of experts: powers of two, then multiples.
SERVED_STEP = 64

# A product such as 100 * 0.29 falls short of the integer it means by less than this.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Budget:
    """What one layer loses, and the shape of its router.

    Attributes:
        name: the layer.
        num_experts: E.
        removed: experts to remove, a multiple of `n_group`.
        asked: floor(E * ratio); more than `removed` where groups made it round down.
        most: the most that may go.
        n_group: routing groups, consecutive runs of E / n_group ids; 1 where the router has none.
    """

    name: str
    num_experts: int
    removed: int
    asked: int
    most: int
    n_group: int


def check_ratio(ratio: float) -> None:
    """Raises PlanError unless 0 < ratio < 1."""
    if not 0 < ratio < 1:  # NaN ends here too
        raise PlanError(
            f"ratio {ratio:g} is not the share of experts to remove; give a number above 0 and "
            "below 1, such as 0.5"
        )


def is_served(experts: int) -> bool:
    """Whether serving engines usually have kernels for this number of experts in a layer."""
    return experts % SERVED_STEP == 0 if experts > SERVED_STEP else experts & (experts - 1) == 0


def served_advice(budgets: Sequence[Budget]) -> list[str]:
    """For each number of experts engines may not serve, the ratios of the next ones they do."""
    advice = {}
    for budget in budgets:
        total, kept = budget.num_experts, budget.num_experts - budget.removed
        possible = range(total - budget.most, total)
        fit = [n for n in possible if is_served(n) and n % budget.n_group == 0]
        near = [max((n for n in fit if n < kept), default=0)]
        near += [min((n for n in fit if n > kept), default=0)]
        if not is_served(kept) and any(near):
            offers = [f"{n} (ratio {ratio_of(total - n, total):g})" for n in near if n]
            advice[kept, total] = (
                f"keeps {kept} of {total} experts a layer; serving engines are surest to have "
                f"kernels for {' or '.join(offers)}"
            )
    return list(advice.values())


def ratio_of(removed: int, experts: int) -> float:
    """The ratio, in as few digits as do, that removes exactly so many."""
    return math.ceil(removed / experts * 1e4 - _ROUNDING) / 1e4


def uniform(layers: Mapping[str, Mapping[str, Any]], ratio: float) -> list[Budget]:
    """The same share of every layer, as whole experts.

    Args:
        layers: per layer `num_experts`, `top_k` and, where the router has groups, `n_group` and
            `topk_group`, as the provenance of statistics records them.
        ratio: share of experts to remove, 0 < ratio < 1.

    Raises:
        PlanError: the ratio is out of range, removes nothing, or leaves a router fewer experts than
            it chooses; the message names the layer, the numbers and the largest ratio that works.
    """
    check_ratio(ratio)
    if not layers:
        raise PlanError("there is no layer to plan; observe the model first")
    return [_budget(name, layer, ratio) for name, layer in layers.items()]


def kept_experts(scores: Tensor, budget: Budget) -> tuple[int, ...]:
    """The ids that stay, ascending: the highest scores of the layer or of each routing group.

    Args:
        scores: float64 [E].
        budget: of this layer.

    Raises:
        PlanError: the scores are of another number of experts.
    """
    if tuple(scores.shape) != (budget.num_experts,):
        raise PlanError(
            f"layer {budget.name}: scores have shape {tuple(scores.shape)}, expected "
            f"({budget.num_experts},); score statistics of this model"
        )
    size = budget.num_experts // budget.n_group
    keep = size - budget.removed // budget.n_group
    grouped = scores.reshape(budget.n_group, size)
    # Stable: of equal scores the lower index comes first, and stays.
    best = grouped.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return tuple(
        group * size + index for group, row in enumerate(best.tolist()) for index in sorted(row)
    )


def _budget(name: str, layer: Mapping[str, Any], ratio: float) -> Budget:
    try:
        experts, top_k = int(layer["num_experts"]), int(layer["top_k"])
    except KeyError as error:
        raise PlanError(
            f"layer {name}: the statistics do not record {error}; observe with reap-kernels, or "
            'add it to provenance["layers"]'
        ) from error
    n_group, topk_group = int(layer.get("n_group") or 1), int(layer.get("topk_group") or 1)
    if experts % n_group:
        raise PlanError(
            f"layer {name}: {experts} experts do not divide into {n_group} routing groups; correct "
            "n_group of the model's config.json"
        )
    asked = math.floor(experts * ratio + _ROUNDING)
    removed = asked // n_group * n_group
    most = _most_removable(experts, top_k, n_group, topk_group)
    if removed == 0 or removed > most:
        unit = f"{n_group} routing groups of equal size" if n_group > 1 else "whole experts"
        problem = (
            f"removes none ({unit})"
            if removed == 0
            else f"leaves {experts - removed}, but the router chooses {top_k} experts"
            + (f" from {topk_group} of {n_group} groups" if n_group > 1 else "")
        )
        remedy = (
            f"use a ratio from {ratio_of(n_group, experts):g} to {ratio_of(most, experts):g}"
            if most
            else "this model cannot lose experts"
        )
        raise PlanError(
            f"ratio {ratio:g} of the {experts} experts of layer {name} {problem}; {remedy}"
        )
    return Budget(name, experts, removed, asked, most, n_group)


def _most_removable(experts: int, top_k: int, n_group: int, topk_group: int) -> int:
    """The most experts that may go; 0 where none may.

    A router without groups needs top_k experts. One with groups scores a group by its best two (so
    two must stay where there are two) and then needs top_k among the groups it chooses.
    """
    if n_group == 1:
        return max(0, experts - top_k)
    size = experts // n_group
    needed = max(min(2, size), -(-top_k // topk_group))
    return max(0, size - needed) * n_group
