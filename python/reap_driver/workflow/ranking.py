"""From options to a plan: how many experts go, and which, by scores of their layers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reap_driver.base.yaml_text import MAX_BYTES, parse_yaml
from reap_driver.planning.amount import Amount, keeping, possible_ratios
from reap_driver.planning.budget import Router
from reap_driver.planning.criteria import CRITERIA, Scores
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import make_plan
from reap_driver.planning.scoring import score
from reap_driver.planning.selection import protected_experts, select_layers, super_experts
from reap_driver.workflow.fields import refused
from reap_driver.workflow.rank_options import (
    RATIO,
    AllocationOptions,
    BudgetOptions,
    RankOptions,
)
from reap_kernels import SaliencyStats
from reap_kernels.documents import read_bytes
from reap_kernels.errors import DataError, PlanError
from reap_kernels.schema import Int, Kind, ListOf, MapOf, Mismatch, Real, check


def scored(stats: SaliencyStats, rank: RankOptions) -> Scores:
    """Scores by the criterion and the weights that are asked for."""
    return score(stats, rank.criterion, None if rank.weights is None else dict(rank.weights))


def planned(
    scores: Scores,
    rank: RankOptions,
    budget: BudgetOptions,
    allocation: AllocationOptions | None = None,
    stats: SaliencyStats | None = None,
    amount: Amount | None = None,
) -> Plan:
    """The plan that options ask for.

    Args:
        scores: of every layer.
        rank, budget, allocation: the options; without an allocation it is uniform.
        stats: what the scores are of; None where there are none yet, and super experts are unknown.
        amount: how much is removed, where `rank` gives a size; otherwise `rank` decides.

    Raises:
        DataError: a file cannot be read or holds something else.
        PlanError: a layer or an expert that was named is not there, or the plan is not possible.
    """
    how = allocation or AllocationOptions()
    protected = protected_of(rank, scores, stats)
    own = _layer_ratios(budget, list(scores), scores.unobserved)
    amount = amount or _amount(rank, how, _routers(scores, own), protected)
    plan = make_plan(
        scores,
        amount.ratio,
        allocation=how.allocation,
        protected=protected,
        layer_ratios=own,
        normalize=how.normalize,
    )
    return replace(plan, settings=plan.settings | dict(amount.asked))


def foreseen(
    blank: Scores,
    rank: RankOptions,
    budget: BudgetOptions,
    allocation: AllocationOptions,
    amount: Amount | None = None,
) -> list[Plan]:
    """The plans, before any statistics, that bound those which the options can lead to.

    A uniform allocation removes as many experts of a layer whatever their scores. A global one may
    empty the first layers as far as it can and leave the last alone: that is the second plan.

    Args:
        blank: scores of the model that is to be pruned; their values do not matter.
        rank, budget, allocation, amount: see `planned`.
    """
    plans = [planned(blank, rank, budget, allocation, amount=amount)]
    if allocation.allocation == "global":
        highest = max(len(values) for values in blank.values())
        rising = {name: v + n * highest for n, (name, v) in enumerate(blank.items())}
        facts = {"model": blank.model, "layers": blank.layers}
        scores = Scores(rising, criterion=blank.criterion, provenance=facts)
        raw = replace(allocation, normalize="none")
        plans.append(planned(scores, rank, budget, raw, amount=amount))
    return plans


def ratios(
    scores: Scores,
    rank: RankOptions,
    budget: BudgetOptions,
    allocation: AllocationOptions | None = None,
    stats: SaliencyStats | None = None,
) -> list[float]:
    """Every ratio that leads to another number of experts, ascending; see `planned`.

    Raises:
        PlanError: there is none, or see `planned`.
    """
    own = _layer_ratios(budget, list(scores), scores.unobserved)
    together = allocation is not None and allocation.allocation == "global"
    protected = protected_of(rank, scores, stats)
    return possible_ratios(_routers(scores, own), protected, together=together)


def _amount(
    rank: RankOptions,
    allocation: AllocationOptions,
    routers: list[Router],
    protected: Mapping[str, frozenset[int]],
) -> Amount:
    """How much is removed, without sizes."""
    assert rank.limit is None, "a size needs the model: see Sizing.amount"
    if rank.keep is None:
        return Amount(RATIO if rank.ratio is None else rank.ratio)
    if allocation.allocation == "global":
        raise refused(
            f"`keep={rank.keep}`: not together with `allocation='global'`, by which layers keep "
            "different numbers; give `ratio`"
        )
    if not routers:
        raise PlanError(f"`keep={rank.keep}`: every layer has a ratio of its own; leave it out")
    return keeping(routers, rank.keep, protected)


def _routers(scores: Scores, own: Mapping[str, float]) -> list[Router]:
    """Of the layers that have no ratio of their own."""
    return [Router.of(name, scores.layers.get(name, {})) for name in scores if name not in own]


def protected_of(
    rank: RankOptions, scores: Scores, stats: SaliencyStats | None
) -> dict[str, frozenset[int]]:
    """{layer: ids} of everything that is protected."""
    wanted: list[tuple[str, tuple[int, ...]]] = []
    for what in rank.protected:
        if isinstance(what, tuple):
            wanted.append(what)
        elif isinstance(what, Path):
            for layer, ids in _read(what, _Experts()).items():
                wanted.append((layer, tuple(ids if isinstance(ids, list) else [ids])))
        elif stats is not None:
            wanted += [(layer, tuple(ids)) for layer, ids in _super_experts(stats).items()]
    return protected_experts(wanted, {name: len(values) for name, values in scores.items()})


def _super_experts(stats: SaliencyStats) -> dict[str, frozenset[int]]:
    """{layer: ids} of the experts with outputs far above all others.

    Raises:
        DataError: the statistics do not record the extremes of outputs.
    """
    criterion = "max_activation"
    wanted = CRITERIA[criterion].fields
    if lacking := [field for field in wanted if field in stats.missing]:
        raise DataError(
            f"`protect=super`: needs {' and '.join(lacking)}, not recorded in these statistics, "
            "which another tool observed; protect experts by their ids, or observe the model with "
            "reap-kernels"
        )
    return super_experts(score(stats, criterion))


def _layer_ratios(
    budget: BudgetOptions, layers: list[str], unobserved: list[str]
) -> dict[str, float]:
    """{layer: ratio} of layers that do not lose `ratio`; skipped are those that were observed."""
    given = budget.layer_ratios
    asked: Mapping[str, float] = {}
    if isinstance(given, Path):
        asked = _read(given, Real(low=0, below=1))
    elif isinstance(given, Mapping):
        asked = given
    found: dict[str, float] = {}
    for selector, ratio in asked.items():
        found |= dict.fromkeys(select_layers(selector, [*layers, *unobserved]), float(ratio))
    first, last = budget.skip_first, budget.skip_last
    if first + last >= len(layers) > 0:
        raise PlanError(
            f"`skip_first={first}` and `skip_last={last}` leave none of the {len(layers)} MoE "
            "layers to prune; skip fewer"
        )
    skipped = [*layers[:first], *layers[len(layers) - last :]]
    return found | dict.fromkeys(skipped, 0.0)


class _Experts:
    """An id of an expert, or a list of them."""

    def check(self, value: Any, at: str) -> None:
        ids = Int()
        (ListOf(ids) if isinstance(value, list) else ids).check(value, at)


def _read(path: Path, kind: Kind) -> dict[str, Any]:
    """A JSON or YAML mapping from layers to what `kind` says; layers can be numbers there.

    Raises:
        DataError: the file cannot be read, or a value in it is something else.
    """
    try:
        content: dict[str, Any] = parse_yaml(read_bytes(path, MAX_BYTES))  # JSON is YAML
        check(content, MapOf(kind, shortest=1))
    except Mismatch as error:
        raise DataError(f"{path}: {error}; see --help for what it should hold") from error
    except ValueError as error:
        raise DataError(f"{path} {error}; correct the file") from error
    return content
