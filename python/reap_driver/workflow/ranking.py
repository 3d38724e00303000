"""From options to a plan: how many experts go, and which, by scores of their layers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reap_driver.base.yaml_text import MAX_BYTES, parse_yaml
from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import make_plan
from reap_driver.planning.scoring import score
from reap_driver.planning.selection import protected_experts, select_layers, super_experts
from reap_driver.workflow.options import AllocationOptions, BudgetOptions, RankOptions
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
) -> Plan:
    """The plan that options ask for.

    Args:
        scores: of every layer.
        rank, budget, allocation: the options; without an allocation it is uniform.
        stats: what the scores are of; None where there are none yet, and super experts are unknown.

    Raises:
        DataError: a file cannot be read or holds something else.
        PlanError: a layer or an expert that was named is not there, or the plan is not possible.
    """
    how = allocation or AllocationOptions()
    return make_plan(
        scores,
        rank.ratio,
        allocation=how.allocation,
        protected=_protected(rank, scores, stats),
        layer_ratios=_layer_ratios(budget, list(scores), scores.unobserved),
        normalize=how.normalize,
    )


def foreseen(
    blank: Scores, rank: RankOptions, budget: BudgetOptions, allocation: AllocationOptions
) -> list[Plan]:
    """The plans, before any statistics, that bound those which the options can lead to.

    A uniform allocation removes as many experts of a layer whatever their scores. A global one may
    empty the first layers as far as it can and leave the last alone: that is the second plan.

    Args:
        blank: scores of the model that is to be pruned; their values do not matter.
        rank, budget, allocation: the options.
    """
    plans = [planned(blank, rank, budget, allocation)]
    if allocation.allocation == "global":
        highest = max(len(values) for values in blank.values())
        rising = {name: v + n * highest for n, (name, v) in enumerate(blank.items())}
        facts = {"model": blank.model, "layers": blank.layers}
        scores = Scores(rising, criterion=blank.criterion, provenance=facts)
        plans.append(planned(scores, rank, budget, replace(allocation, normalize="none")))
    return plans


def _protected(
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
            peaks = super_experts(score(stats, "max_activation"))
            wanted += [(layer, tuple(ids)) for layer, ids in peaks.items()]
    return protected_experts(wanted, {name: len(values) for name, values in scores.items()})


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
