"""Makes plans: from scores to the experts that every layer keeps."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.planning.allocation import explicit, pooled, removal_target, uniform
from reap_driver.planning.budget import Budget, check_ratio, kept_experts
from reap_driver.planning.criteria import Scores
from reap_driver.planning.custom_criteria import check_decides, check_scores, plain_scores
from reap_driver.planning.plan import NORMALIZE_KEY, LayerPlan, Plan, deciding_facts
from reap_driver.planning.scoring import random_values
from reap_driver.planning.unobserved import unobserved_kept_whole, unobserved_notes
from reap_kernels import SaliencyStats
from reap_kernels.errors import PlanError

# How `make_plan` can divide the removed experts among layers.
ALLOCATIONS = ("uniform", "global")
# The largest share of experts that the paper of REAP has results for (arXiv 2510.13999: 0.25, 0.5).
_MEASURED = 0.5


@typed
def make_plan(
    scores: Scores | Mapping[str, Tensor | Sequence[float]],
    ratio: float = 0.5,
    *,
    criterion: str | None = None,
    of: SaliencyStats | Mapping[str, Any] | None = None,
    allocation: str = "uniform",
    protected: Mapping[str, Collection[int]] | None = None,
    layer_ratios: Mapping[str, float] | None = None,
    normalize: str | None = None,
) -> Plan:
    """Decides which experts every layer keeps.

    Args:
        scores: of every MoE layer, from `reap_driver.score`; or your own scores {layer: [E]}, a
            tensor or a list of finite numbers, where higher scores are kept.
        ratio: share of experts to remove, 0 < ratio < 1; rounded down to whole experts, and to
            equal numbers per routing group where the router has groups.
        criterion: name of your own scores in plans, cards and reports.
        of: for your own scores, which model they belong to: its statistics, or its record from
            `reap_driver.record_of`. They say how its layers route.
        allocation: "uniform" removes the share from every layer; "global" removes it from all
            experts together, those with the lowest scores.
        protected: {layer: ids} of experts that are kept whatever their scores. The layer loses as
            many others.
        layer_ratios: {layer: ratio} of layers that lose another share than `ratio`; 0 keeps all
            their experts. Layers that no token reached keep all experts; if one field of the
            configuration counts their experts and those of layers that lose some, they must be
            named here with the ratio 0.
        normalize: for "global", what a layer's scores are divided by before layers are compared:
            their "mean" (default) or "max", or "none".

    Returns:
        The plan; layers in the order of `scores`.

    Raises:
        PlanError: the ratio or the allocation is not possible; or scores are not finite, not one
            per expert, or all equal in a layer. The message names the layer and what is possible.

    Example:
        >>> rd.make_plan(scores, ratio=0.5).criterion
        'reap'
        >>> own = {name: values.tolist() for name, values in scores.items()}
        >>> plan = rd.make_plan(own, 0.5, criterion="mine", of=stats)
        >>> {len(kept) for kept in plan.kept.values()}
        {16}
    """
    scores = _checked(scores, criterion, of)
    if allocation not in ALLOCATIONS:
        raise PlanError(
            f"allocation {allocation!r} is unknown; choose one of {', '.join(ALLOCATIONS)}"
        )
    if normalize is not None and allocation != "global":
        raise PlanError(
            f"normalize {normalize!r} has no effect on {allocation} allocation, which compares no "
            "scores of different layers; leave it out, or choose global"
        )
    facts, asked = _facts(scores), layer_ratios or {}
    _check_names([*facts, *scores.unobserved], protected or {}, asked)
    layer_ratios = {name: share for name, share in asked.items() if name in facts}
    whole = unobserved_kept_whole(scores, asked)
    settings: dict[str, Any] = {}
    if allocation == "global":
        settings[NORMALIZE_KEY] = normalize or "mean"
        budgets = pooled(
            scores,
            facts,
            ratio,
            protected=protected,
            layer_ratios=layer_ratios,
            normalize=settings[NORMALIZE_KEY],
        )
        notes = _short_notes(budgets, facts, ratio, layer_ratios)
    else:
        budgets = uniform(facts, ratio, protected=protected, layer_ratios=layer_ratios)
        notes = _rounding_notes(budgets)
    if not any(budget.removed for budget in budgets):
        raise PlanError("nothing is removed: every layer is to keep all its experts")
    if asked:
        settings["layer_ratios"] = dict(asked)
    return _plan(scores, budgets, allocation, ratio, notes, settings, whole)


@typed
def plan_of_removals(
    scores: Scores,
    removals: Mapping[str, int],
    *,
    allocation: str,
    ratio: float,
    protected: Mapping[str, Collection[int]] | None = None,
) -> Plan:
    """The plan that removes a given number of experts per layer, those with the lowest scores.

    Args:
        scores: of every MoE layer.
        removals: {layer: number of experts to remove}: at most `max_removable` and a multiple of
            `removal_steps`, both of `planning.allocation`. Layers that no token reached are left
            out, or given 0 as `make_plan` explains for `layer_ratios`.
        allocation: recorded as what found the numbers.
        ratio: recorded as the share of experts that was asked to be removed.
        protected: {layer: ids} of experts that are kept whatever their scores.

    Returns:
        The plan; layers in the order of `scores`.

    Raises:
        PlanError: the removals are not possible; the message says which are.

    Example:
        >>> removals = {name: 8 for name in scores}
        >>> plan = rd.plan_of_removals(scores, removals, allocation="mine", ratio=0.25)
        >>> {len(layer.removed) for layer in plan.layers.values()}
        {8}
    """
    check_ratio(ratio)
    facts = _facts(scores)
    _check_names(facts, protected or {}, {})
    whole = unobserved_kept_whole(scores, removals)
    ranked = {name: number for name, number in removals.items() if name not in scores.unobserved}
    budgets = explicit(facts, ranked, protected=protected)
    if not any(budget.removed for budget in budgets):
        raise PlanError("removals are 0 in every layer; remove at least one expert")
    return _plan(scores, budgets, allocation, ratio, [], {}, whole)


def plan_of_kept(
    kept: Mapping[str, Collection[int]],
    of: Mapping[str, Any],
    *,
    criterion: str,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan that keeps given experts, which something else chose.

    Args:
        kept: {layer: ids of its experts that stay}; layers that are not named keep all.
        of: `model` and `layers` of the model, as `reap_driver.record_of` has them.
        criterion: recorded as what chose them.
        notes: of the plan.

    Raises:
        PlanError: no expert goes; a layer is unknown, or keeps an expert that it does not have or
            fewer than its router chooses, or its routing groups are left with different numbers.
    """
    facts: Mapping[str, Mapping[str, Any]] = of["layers"]
    _check_names(facts, kept)
    values = {}
    for name, layer in facts.items():
        total = int(layer["num_experts"])
        ids = set(kept.get(name, range(total)))
        if not ids <= set(range(total)):
            raise PlanError(
                f"layer {name}: expert {min(ids - set(range(total)))} is none of its {total}, "
                f"0..{total - 1}; use what was made for this model"
            )
        values[name] = torch.tensor([float(e in ids) for e in range(total)], dtype=torch.float64)
    removals = {name: int((ranks == 0).sum()) for name, ranks in values.items()}
    removed = sum(removals.values())
    if not removed:
        raise PlanError("nothing is removed: every layer is to keep all its experts")
    scores = Scores(values, criterion=criterion, provenance=of)
    budgets = explicit(facts, removals)
    share = removed / sum(map(len, values.values()))
    plan = _plan(scores, budgets, "imported", share, list(notes), {}, [])
    for name, planned in plan.layers.items():
        if set(planned.kept) != set(kept.get(name, planned.kept)):
            raise PlanError(
                f"layer {name}: its {facts[name]['n_group']} routing groups would keep different "
                "numbers of experts, which no checkpoint can say; keep as many in each"
            )
    return plan


def plan_keeping(
    scores: Scores,
    keep: int,
    *,
    ratio: float,
    protected: Mapping[str, Collection[int]] | None = None,
) -> Plan:
    """The plan that keeps equally many experts of every layer, perhaps all of them: what a plan
    begins with that removes neurons, too.

    Args:
        scores: of every MoE layer.
        keep: experts that each layer keeps, those with the highest scores.
        ratio: recorded as the share of the expert weights that was asked to be removed.
        protected: {layer: ids} of experts that are kept whatever their scores.

    Raises:
        PlanError: a layer cannot keep that many.
    """
    check_ratio(ratio)
    facts = _facts(scores)
    _check_names(facts, protected or {}, {})
    removals = {name: len(scores[name]) - keep for name in facts}
    budgets = explicit(facts, removals, protected=protected)
    return _plan(scores, budgets, "uniform", ratio, [], {}, [])


@typed
def random_plan(scores: Scores, ratio: float, seed: int) -> Plan:
    """The baseline: as many experts of every layer as a uniform plan keeps, chosen at random.

    Args:
        scores: say which model and layers; their values are not used.
        ratio: share of experts to remove, 0 < ratio < 1.
        seed: of the choice; equal seeds give equal plans on every machine.

    Raises:
        PlanError: see `make_plan`.

    Example:
        >>> rd.random_plan(scores, ratio=0.5, seed=0).criterion
        'random:0'
    """
    values = random_values({name: len(known) for name, known in scores.items()}, seed)
    provenance = {
        "model": scores.model,
        "layers": scores.layers,
        "unobserved": scores.unobserved,
        "stacks": scores.stacks,
    }
    return make_plan(Scores(values, criterion=f"random:{seed}", provenance=provenance), ratio)


def _checked(
    scores: Mapping[str, Any], criterion: str | None, of: SaliencyStats | Mapping[str, Any] | None
) -> Scores:
    """Scores with their provenance, checked to be one per expert."""
    if isinstance(scores, Scores):
        if criterion is not None or of is not None:
            raise PlanError(
                f"criterion and of are for plain scores; these are by {scores.criterion!r} and "
                "know their model"
            )
        known = {name: facts for name, facts in scores.layers.items() if name in scores}
        sizes = {name: facts.get("num_experts", len(scores[name])) for name, facts in known.items()}
        check_scores(scores, scores.criterion, sizes)
        return scores
    if criterion is None or of is None:
        raise PlanError(
            "scores of your own need a name and the model they are of: make_plan(scores, ratio, "
            'criterion="mine", of=stats), or of=rd.record_of(model)'
        )
    record = of if isinstance(of, Mapping) else of.provenance
    if not isinstance(record.get("layers"), Mapping):
        raise PlanError(
            "of: holds no `layers`, which say how the model routes; give statistics, or "
            "rd.record_of(model)"
        )
    return plain_scores(scores, criterion, record)


def _facts(scores: Scores) -> dict[str, dict[str, Any]]:
    """{layer: its facts}, for each scored layer."""
    missing = [name for name in scores if name not in scores.layers]
    if missing:
        raise PlanError(
            f"layer {missing[0]}: the statistics do not say how it routes (top_k, n_group); "
            'observe with reap-kernels, or add it to provenance["layers"]'
        )
    return {name: scores.layers[name] for name in scores}


def _check_names(layers: Collection[str], *asked: Mapping[str, Any]) -> None:
    """Checks that every layer that was named is one of the model's."""
    for name in (name for names in asked for name in names):
        if name not in layers:
            raise PlanError(
                f"layer {name!r} is none of the {len(layers)} MoE layers; `select_layers` of "
                "reap_driver.planning.selection finds them by number or pattern"
            )


def _plan(
    scores: Scores,
    budgets: Sequence[Budget],
    allocation: str,
    ratio: float,
    notes: list[str],
    settings: dict[str, Any],
    whole: Collection[str],
) -> Plan:
    """The plan that keeps the experts with the highest scores, as many as the budgets leave."""
    unobserved_facts: dict[str, dict[str, Any]] = {name: {} for name in scores.unobserved}
    notes = [*notes, *unobserved_notes(scores, whole, [b.name for b in budgets if b.removed])]
    check_decides(scores, scores.criterion, [b.name for b in budgets if b.removed])
    layers = {
        budget.name: LayerPlan.keeping(
            budget.num_experts, kept_experts(scores[budget.name], budget)
        )
        for budget in budgets
    }
    protected = {b.name: sorted(b.protected) for b in budgets if b.protected}
    plan = Plan(
        model=scores.model | {"layers": deciding_facts(scores.layers | unobserved_facts)},
        criterion=scores.criterion,
        allocation=allocation,
        ratio=float(ratio),
        layers=layers,
        scores_digest=scores.digest(),
        weights=scores.weights,
        data=scores.data,
        observed=scores.observed,
        notes=[*scores.notes, *notes],
        settings=settings | ({"protected": protected} if protected else {}),
    )
    if not plan.uniform:
        plan.notes.append(_uneven_note(budgets))
    plan.notes.extend(_much_notes(budgets))
    return plan


def _rounding_notes(budgets: Sequence[Budget]) -> list[str]:
    """Notes on layers that lose fewer experts than asked because routing groups must stay equal."""
    notes = {
        f"removes {b.removed} instead of {b.asked} of {b.num_experts} experts a layer: the "
        f"{b.n_group} routing groups must stay equal in size"
        for b in budgets
        if b.removed < b.asked
    }
    return sorted(notes)


def _short_notes(
    budgets: Sequence[Budget],
    facts: Mapping[str, Mapping[str, Any]],
    ratio: float,
    layer_ratios: Mapping[str, float],
) -> list[str]:
    """A note where a ranking across layers could not remove as many experts as asked."""
    pool = [budget for budget in budgets if budget.name not in layer_ratios]
    removed, wanted = sum(b.removed for b in pool), removal_target(facts, ratio, layer_ratios)
    if removed == wanted:
        return []
    return [
        f"removes {removed} instead of {wanted} of {sum(b.num_experts for b in pool)} experts: "
        "routers need as many as they choose, and routing groups stay equal in size"
    ]


def _uneven_note(budgets: Sequence[Budget]) -> str:
    """A note on layers that keep different numbers of experts, and on what can load them."""
    kept = [budget.kept for budget in budgets]
    return (
        f"layers keep from {min(kept)} to {max(kept)} experts: transformers' own from_pretrained, "
        "vLLM and SGLang read one number for all layers and refuse such a checkpoint; `apply "
        "--non-uniform` writes it for reap_driver to load"
    )


def _much_notes(budgets: Sequence[Budget]) -> list[str]:
    """A note where more goes than the paper of REAP measured, as a size may ask for unknowingly."""
    removed, experts = sum(b.removed for b in budgets), sum(b.num_experts for b in budgets)
    if removed <= _MEASURED * experts:
        return []
    return [
        f"removes {removed / experts:.0%} of the experts; the results of REAP's paper end at "
        f"{_MEASURED:.0%}, so compare the result with the original before you use it"
    ]
