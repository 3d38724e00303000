"""What the view shows at one time: the server's status, and its statistics with the plan that they
would give now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from reap_driver.integrations.vllm.client import Server
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import make_plan
from reap_driver.planning.retained import Retained, retained
from reap_driver.planning.scoring import score
from reap_driver.reporting.measures import Cut, labels_of
from reap_kernels import SaliencyStats
from reap_kernels.errors import ReapError


@dataclass(frozen=True)
class Strip:
    """One MoE layer.

    Attributes:
        name: of the layer.
        label: its number in the model.
        scores: float64 [E].
        count: int64 [E], rows routed to each expert.
        masked: ids of the experts that the server masks.
        cut: where the plan cuts it; None without a plan.
        kept_mass: share of the router weights on experts that the plan keeps; None without a plan.
    """

    name: str
    label: str
    scores: Tensor
    count: Tensor
    masked: Sequence[int] = ()
    cut: Cut | None = None
    kept_mass: float | None = None

    @property
    def kept(self) -> int:
        """Number of experts that the plan keeps."""
        return len(self.scores) if self.cut is None else int(self.cut.kept.sum())

    def facts(self) -> dict[str, Any]:
        """In numbers, for machines."""
        own: dict[str, Any] = {"experts": len(self.scores), "dead": int((self.count == 0).sum())}
        own |= {"masked": len(self.masked)}
        if self.cut is not None:
            own |= {"kept": self.kept, "near": self.cut.near, "gap": self.cut.gap}
            own |= {"kept_mass": self.kept_mass}
        return own


@dataclass(frozen=True)
class Wanted:
    """The plan whose margin is shown.

    Attributes:
        ratio: share of the experts that it removes.
        criterion: that ranks them.
    """

    ratio: float = 0.5
    criterion: str = "reap"


@dataclass(frozen=True)
class Look:
    """A server at one time.

    Attributes:
        url: of the server.
        status: see `Server.status`.
        at: seconds, of a clock that never goes back.
        wanted: the plan that is asked for.
        strips: of the layers; empty where no token was counted.
        plan: that the statistics would give now; None where there is none.
        problem: why something is not shown; empty where all is.
        rates: {group: tokens per second} since the look before; empty for the first.
        changed: experts that the look before would have kept and this one removes; None for the
            first.
    """

    url: str
    status: Mapping[str, Any]
    at: float
    wanted: Wanted
    strips: Sequence[Strip] = ()
    plan: Plan | None = None
    problem: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)
    changed: int | None = None

    @property
    def tokens(self) -> int:
        """Counted tokens, of all groups."""
        return sum(self.status["groups"].values())

    def facts(self) -> dict[str, Any]:
        """In numbers, for machines."""
        plan = None
        if self.plan is not None:
            near = sum(strip.cut.near for strip in self.strips if strip.cut is not None)
            plan = {"criterion": self.plan.criterion, "ratio": self.plan.ratio, "near": near}
        return {
            "url": self.url,
            "status": dict(self.status),
            "plan": plan,
            "strips": {strip.name: strip.facts() for strip in self.strips},
            "problem": self.problem or None,
        }


def look(server: Server, wanted: Wanted, at: float, before: Look | None = None) -> Look:
    """Asks a server for its status and, where tokens were counted, for its statistics.

    Args:
        server: that is asked.
        wanted: the plan whose margin is shown.
        at: the time, in seconds of a clock that never goes back.
        before: the look before, which rates and changes are measured from.

    Raises:
        ReapError: the server does not answer, see `Server`. What its statistics do not allow is no
            error but a problem that is shown.
    """
    status = server.status()
    seen = Look(server.url, status, at, wanted, rates=_rates(status, at, before))
    if not seen.tokens:
        return seen
    masked = server.masked()["removed"] if status["mask"] else {}
    try:
        stats = server.stats()
    except ReapError as error:  # the server has just answered: these statistics are refused
        return replace(seen, problem=f"no statistics: {error}")
    return _with_statistics(seen, stats, masked, before)


def _with_statistics(
    seen: Look, stats: SaliencyStats, masked: Mapping[str, Sequence[int]], before: Look | None
) -> Look:
    """A look, with what statistics add to it."""
    wanted, plan, problem = seen.wanted, None, ""
    try:
        scores = score(stats, wanted.criterion)
    except ReapError as error:
        return replace(seen, problem=f"no scores: {error}")
    try:
        plan = make_plan(scores, wanted.ratio)
    except ReapError as error:
        problem = f"no plan: {error}"
    shares = {} if plan is None else retained(stats, plan)
    strips = [
        _strip(name, label, scores[name], stats, plan, shares, masked.get(name, ()))
        for name, label in zip(stats.layers, labels_of(list(stats.layers)), strict=True)
    ]
    same = before is not None and before.wanted == wanted
    changed = _changed(before.plan, plan) if before is not None and same else None
    return replace(seen, strips=strips, plan=plan, problem=problem, changed=changed)


def _strip(
    name: str,
    label: str,
    scores: Tensor,
    stats: SaliencyStats,
    plan: Plan | None,
    shares: Mapping[str, Retained],
    masked: Sequence[int],
) -> Strip:
    """One layer."""
    count = stats.layers[name].total().count[0]
    if plan is None:
        return Strip(name, label, scores, count, masked)
    cut = Cut.of(scores, list(plan.layers[name].kept), None)
    return Strip(name, label, scores, count, masked, cut, shares[name].router_weight_share)


def _rates(status: Mapping[str, Any], at: float, before: Look | None) -> dict[str, float]:
    """Tokens per second of each group; a count that fell was reset and begins again."""
    if before is None or at <= before.at:
        return {}
    earlier = before.status["groups"]
    found = {}
    for group, tokens in status["groups"].items():
        more = tokens - earlier.get(group, 0)
        found[group] = max(0, tokens if more < 0 else more) / (at - before.at)
    return found


def _changed(before: Plan | None, after: Plan | None) -> int | None:
    """Experts that the first plan keeps and the second removes; None where one is missing."""
    if before is None or after is None:
        return None
    return sum(
        len(set(before.layers[name].kept) & set(layer.removed))
        for name, layer in after.layers.items()
        if name in before.layers
    )
