"""How much is removed where no ratio is given: what keeps N experts, or makes a size.

A ratio decides how many experts go, and only few ratios differ in that: those at which some layer
loses one more expert. Every other amount is turned into one of them.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from reap_driver.planning.budget import Router, floor_of, nearest, ratio_of, refusal
from reap_kernels.errors import PlanError

Protected = Mapping[str, Collection[int]]


@dataclass(frozen=True)
class Amount:
    """How much is removed.

    Attributes:
        ratio: share of experts.
        asked: what was given in place of a ratio, as plans record it, such as {"keep": 32}.
    """

    ratio: float
    asked: Mapping[str, int] = field(default_factory=dict)


def keeping(routers: Sequence[Router], keep: int, protected: Protected) -> Amount:
    """The ratio that leaves every layer this number of experts.

    Args:
        routers: of the layers that lose experts, one at least.
        keep: the number.
        protected: {layer: ids} that stay.

    Raises:
        PlanError: no ratio does; the message names the nearest numbers for which one does.
    """
    experts = {router.num_experts for router in routers}
    if len(experts) > 1:
        raise PlanError(
            f"`keep={keep}`: layers have {' or '.join(map(str, sorted(experts)))} experts, and one "
            "ratio cannot leave all of them the same number; give `ratio`, or give the layers of "
            "one kind ratios of their own by `layer_ratios`"
        )
    [total] = experts
    steps = (set(_removals(router, protected)) for router in routers)
    possible = sorted(total - removed for removed in set.intersection(*steps))
    if keep in possible:
        return Amount(ratio_of(total - keep, total), {"keep": keep})
    raise PlanError(
        f"`keep={keep}` {_why_not(routers, keep, protected)}; {_nearest(possible, keep)}"
    )


def possible_ratios(
    routers: Sequence[Router], protected: Protected, *, together: bool
) -> list[float]:
    """Every ratio at which some layer loses one more expert than before, ascending.

    Args:
        routers: of the layers that lose experts.
        protected: {layer: ids} that stay.
        together: the ratio is of the experts of all layers, rather than of each layer.

    Raises:
        PlanError: there is none.
    """
    removals = {router: _removals(router, protected) for router in routers}
    if together:
        total = sum(router.num_experts for router in routers)
        most = sum(max(steps, default=0) for steps in removals.values())
        least = min((router.n_group for router, steps in removals.items() if steps), default=1)
        found = {ratio_of(removed, total) for removed in range(least, most + 1)}
    else:
        every = {ratio_of(n, router.num_experts) for router, ns in removals.items() for n in ns}
        found = {ratio for ratio in every if all(_loses(r, ratio, protected) for r in routers)}
    if not found:
        raise PlanError(
            "no ratio removes experts of every layer: routers need as many as they choose, and "
            "protected experts stay; protect fewer, or give some layers the ratio 0 by "
            "`layer_ratios`"
        )
    return sorted(found)


def smallest_within(
    ratios: Sequence[float], size: Callable[[float], int], limit: int, whole: int
) -> float | None:
    """The smallest ratio whose size is within a limit; None if that of no ratio is.

    Sizes fall almost in proportion to what is removed, so each guess is interpolated between the
    nearest known sizes: three or four are computed, where bisection would compute ten.

    Args:
        ratios: ascending; the size falls from each to the next, or stays.
        size: of a ratio, in bytes.
        limit: in bytes.
        whole: size where nothing is removed, above the limit.
    """
    low, above = -1, whole  # too large
    high, within = len(ratios) - 1, size(ratios[-1])
    if within > limit:
        return None
    while high - low > 1:
        share = (above - limit) / (above - within)
        guess = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
        found = size(ratios[guess])
        if found <= limit:
            high, within = guess, found
        else:
            low, above = guess, found
    return ratios[high]


def _removals(router: Router, protected: Protected) -> range:
    """Numbers of experts that a layer can lose."""
    step = router.n_group
    return range(step, router.most(protected.get(router.name, ())) + 1, step)


def _loses(router: Router, ratio: float, protected: Protected) -> bool:
    """Whether a layer can lose what a ratio asks for, and loses any."""
    step = router.n_group
    return floor_of(router.num_experts, ratio) // step * step in _removals(router, protected)


def _why_not(routers: Sequence[Router], keep: int, protected: Protected) -> str:
    """Why layers cannot keep this number of experts."""
    for router in routers:
        if keep >= router.num_experts:
            return f"of {router.num_experts} experts removes none"
        removed = router.num_experts - keep
        problem = refusal(router, removed, protected.get(router.name, ()))
        if problem is not None:
            return f"of the {router.num_experts} experts of layer {router.name} {problem}"
    grouped = max(routers, key=lambda router: router.n_group)
    return f"is no multiple of the {grouped.n_group} routing groups of layer {grouped.name}"


def _nearest(possible: Sequence[int], keep: int) -> str:
    """The remedy: the nearest numbers that work."""
    found = [str(n) for n in nearest(possible, keep)]
    return f"give {' or '.join(found)}" if found else "this model cannot lose experts"
