"""Checks of a plan against the model it is applied to, before anything is written."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from reap_driver.base.mtp import MtpChoice
from reap_driver.model.discover import MoELayer
from reap_driver.model.stacks import Stack, stack_near
from reap_driver.planning.plan import Plan
from reap_driver.planning.public_provenance import public_name
from reap_driver.writer.actions import split_layer
from reap_kernels.errors import PlanError
from reap_kernels.model_match import differences

# Why numbers of experts may not differ between layers, and what to do.
_UNREADABLE = (
    "transformers' own from_pretrained, vLLM and SGLang read one count for all layers and would "
    "not load that. Pass `non_uniform=True` for a checkpoint that reap_driver and "
    "the load_pruned.py beside its weights load, write masks (`as_masks`), or plan with an "
    "allocation that keeps the same number everywhere (`allocation='uniform'`)."
)
_DRAFTING = (
    "Engines build the multi-token-prediction layer with that many, too: plan the same number for "
    "it (with `skip_last`, it is the last layer), or leave it out (`mtp='drop'`)."
)
_TOGETHER = (
    "they are in one decoder layer, whose own code counts them together, so both must keep as "
    "many: plan the same number for both, from calibration data that reach both (images, where one "
    "is for vision), or write masks, for which numbers may differ (`as_masks`)."
)


def check_model(
    plan: "Plan",
    record: Mapping[str, Any],
    where: object,
    *,
    force: bool = False,
    forcible: bool = True,
) -> list[str]:
    """Checks that a plan was made for this model, or for one that routes alike and has its sizes.

    Args:
        plan: to be applied.
        record: of the model it is applied to, see `reap_driver.model.discover.record_of`.
        where: the model, for messages.
        force: accept other routing and sizes too. Whether the plan can be written is checked by
            `check_layers`.
        forcible: whether who reads the message could say `force`.

    Returns:
        Notes on what differs, for the model card and the report.

    Raises:
        PlanError: it was made for another model; the message names the fields that differ.
    """
    found, here = differences(plan.record, record), public_name(str(where))
    if not found.text:
        return []
    if not plan.model.get("config_digest") and not found.deciding:
        if force:
            return [f"made from statistics that record no model, applied to {here} by force"]
        way = "pass `force_model=True` if it is, or " if forcible else ""
        raise PlanError(
            "plan: made from statistics that record no model, so whether it is of "
            f"{where} cannot be checked; {way}record the model in the statistics: "
            "SaliencyStats(layers, groups, rd.record_of(model))."
        )
    made_for = plan.model.get("id")
    if not force and (found.deciding or found.unnamed):
        way = ", or take it all the same by `force_model=True`" if forcible else ""
        raise PlanError(
            f"plan: made for {made_for!r}, which is no match for {where}: "
            f"{', '.join(found.deciding) or found.text}; make the plan from statistics of this "
            f"model{way}."
        )
    how = "applied by force" if found.deciding or found.unnamed else "applied"
    return [f"made for {public_name(str(made_for))} (there), {how} to {here} (here): {found.text}"]


def check_kept(plan: "Plan") -> None:
    """Checks what can be checked of a plan without the model.

    Raises:
        PlanError: there is no layer, kept ids are invalid, or nothing is removed or changed.
    """
    if not plan.layers:
        raise PlanError("plan: has no layers.")
    plan.check()
    for name, layer in plan.layers.items():
        kept = layer.kept
        if (
            list(kept) != sorted(set(kept))
            or not kept
            or kept[0] < 0
            or kept[-1] >= layer.num_experts
        ):
            raise PlanError(
                f"plan: layer {name!r} keeps {list(kept)}, expected ascending ids in [0, "
                f"{layer.num_experts})."
            )
    whole = all(len(layer.kept) == layer.num_experts for layer in plan.layers.values())
    if whole and not plan.compensates:
        numbers = sorted({layer.num_experts for layer in plan.layers.values()})
        experts = " or ".join(map(str, numbers))
        raise PlanError(f"plan: removes none of {experts} experts; use a ratio above 0.")


def check_counts(
    plan: "Plan",
    stacks: Sequence[Stack],
    counts: Mapping[str, tuple[int, int]],
    *,
    non_uniform: bool,
    mtp: MtpChoice,
) -> None:
    """Checks, stack by stack, that the numbers of experts that layers keep can be written.

    Args:
        plan: what is to be written. Layers that the model does not have are multi-token-prediction
            layers; they belong to the stack with the most similar names.
        stacks: of the model: which of its layers share a field that counts their experts.
        counts: every MoE layer of the model -> its experts before and after.
        non_uniform: layers of a stack may keep different numbers.
        mtp: what happens to multi-token-prediction layers; they count here where they are pruned.

    Raises:
        PlanError: numbers differ between layers where they may not.
    """
    pruned = [name for name in plan.layers if name not in counts] if mtp == "prune" else []
    further = {name: stack_near(name, stacks) for name in pruned}
    for stack in stacks:
        after = {name: counts[name][1] for name in stack.layers}
        before = {counts[name][0] for name in stack.layers}
        for name in (name for name, near in further.items() if near == stack):
            _check_further(plan, name, before)
            after[name] = len(plan.layers[name].kept)
        own = [name for name in after if name in further]
        removed = any(plan.layers[name].removed for name in own)
        if not removed and all(after[name] == counts[name][0] for name in stack.layers):
            continue  # nothing is removed, even if its layers have different numbers
        if not non_uniform:
            both = f"{stack.field} of config.json counts both. "
            _check_equal(plan, {n: k for n, k in after.items() if n in counts}, both + _UNREADABLE)
            _check_equal(plan, after, both + _DRAFTING)
        decoders: dict[str, dict[str, int]] = {}
        for name, count in after.items():
            decoders.setdefault(split_layer(name)[0], {})[name] = count
        for together in decoders.values():
            _check_equal(plan, together, _TOGETHER)


def _check_further(plan: "Plan", name: str, experts: Collection[int]) -> None:
    """Checks that an MTP layer has as many experts as the layers of its stack, if these agree.

    Raises:
        PlanError: it has another number.
    """
    if len(experts) == 1 and plan.layers[name].num_experts not in experts:
        raise PlanError(
            f"plan: counts {plan.layers[name].num_experts} experts in {name!r}, the layers of its "
            f"stack have {min(experts)}; correct the entry."
        )


def _check_equal(plan: "Plan", counts: Mapping[str, int], why: str) -> None:
    """Checks that layers keep equally many experts.

    Raises:
        PlanError: they do not; names two of them.
    """
    first = next(iter(counts))
    other = next((name for name in counts if counts[name] != counts[first]), None)
    if other is None:
        return
    unplanned = next((name for name in (first, other) if name not in plan.layers), None)
    all_of_it = f" (the plan does not name {unplanned!r}, so it keeps all)" if unplanned else ""
    raise PlanError(
        f"plan: {first!r} keeps {counts[first]} experts but {other!r} keeps {counts[other]}"
        f"{all_of_it}; {why}"
    )


def check_layers(plan: "Plan", layers: Sequence[MoELayer]) -> tuple[str, ...]:
    """Checks that a plan fits the model's MoE layers and leaves each router enough experts.

    Layers that the plan does not name keep all their experts.

    Returns:
        Layers of the plan that the model does not have: MTP layers, or mistakes.

    Raises:
        PlanError: naming layer, counts and remedy.
    """
    for layer in layers:
        planned = plan.layers.get(layer.name)
        if planned is None:
            known = plan.model.get("layers")
            if known is not None and layer.name not in known:
                raise PlanError(
                    f"plan: made for a model without {layer.name!r}, one of the {len(layers)} MoE "
                    f"layers of this one, and with {next(iter(plan.layers), None)!r}; make the "
                    "plan from statistics of this model, under the names of its layers."
                )
            continue
        if planned.num_experts != layer.num_experts:
            raise PlanError(
                f"plan: counts {planned.num_experts} experts in {layer.name!r}, the model has "
                f"{layer.num_experts}; make the plan from statistics of this model."
            )
        if len(planned.kept) < layer.top_k:
            raise PlanError(
                f"plan: keeps {len(planned.kept)} experts in {layer.name!r}, but a token is routed "
                f"to {layer.top_k}; lower the ratio to {1 - layer.top_k / layer.num_experts:.3g} "
                "or less."
            )
        if layer.n_group > 1:
            check_groups(layer, planned.kept)
    known = {layer.name for layer in layers}
    return tuple(name for name in plan.layers if name not in known)


def check_same_layers(plan: "Plan", layers: Sequence[MoELayer]) -> None:
    """`check_layers`, and that the plan names no layer that the model does not have.

    Raises:
        PlanError: see `check_layers`; or the plan names such a layer.
    """
    for name in check_layers(plan, layers):
        if is_mtp(plan, name):
            raise PlanError(
                f"plan: layer {name!r} is for multi-token prediction, which is not part of what "
                "the model computes here; use statistics that were observed without it (leave out "
                "`with_mtp=True`)."
            )
        raise no_such_layer(name)


def main_layers(plan: "Plan") -> "Plan":
    """The plan without multi-token-prediction layers, for what the model itself computes."""
    kept = {name: layer for name, layer in plan.layers.items() if not is_mtp(plan, name)}
    return plan if len(kept) == len(plan.layers) else replace(plan, layers=kept)


def is_mtp(plan: "Plan", name: str) -> bool:
    """Whether a layer was observed as a multi-token-prediction layer."""
    facts = (plan.model.get("layers") or {}).get(name) or {}
    return facts.get("mtp") is True


def no_such_layer(name: str) -> PlanError:
    """The error for a layer of a plan that the model does not have."""
    return PlanError(
        f"plan: layer {name!r} does not exist in this model; make the plan from statistics of this "
        "model."
    )


def check_groups(layer: MoELayer, kept: Sequence[int]) -> None:
    """Checks that a router with groups can choose among the kept experts.

    Groups are runs of consecutive ids, so experts stay in their groups only if every group keeps
    the same number.

    Raises:
        PlanError: groups keep different numbers, or too few.
    """
    size = layer.num_experts // layer.n_group
    counts = [0] * layer.n_group
    for expert in kept:
        counts[expert // size] += 1
    if len(set(counts)) > 1:
        raise PlanError(
            f"plan: layer {layer.name!r} keeps {counts} experts in its {layer.n_group} routing "
            "groups; they must be equal, so plan with group-limited allocation."
        )
    if counts[0] < min(2, size) or layer.topk_group * counts[0] < layer.top_k:
        raise PlanError(
            f"plan: layer {layer.name!r} keeps {counts[0]} experts in each routing group; a group "
            f"is ranked by its two best, and {layer.topk_group} groups must hold {layer.top_k} "
            "experts; lower the ratio."
        )


def loader_warning(counts: Collection[int]) -> str:
    """A warning for a checkpoint whose layers keep different numbers of experts."""
    return (
        f"layers keep {min(counts)} to {max(counts)} experts: load this checkpoint with the "
        "load_pruned.py beside its weights, or with reap_driver; transformers' own "
        "from_pretrained, vLLM and SGLang read one count for all layers and refuse it."
    )
