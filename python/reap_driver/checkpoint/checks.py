"""Checks of a plan against the model it is applied to, before anything is written."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from reap_driver.allocate import SERVED_STEP, is_served
from reap_driver.compat.models import config_digest
from reap_driver.discover import MoELayer
from reap_kernels.errors import PlanError

if TYPE_CHECKING:
    from reap_driver.plan import Plan


def check_model(plan: "Plan", config: PretrainedConfig, where: object) -> None:
    """The plan was made for this model.

    Raises:
        PlanError: it was made for another one.
    """
    digest = config_digest(config)
    if plan.model.get("config_digest") != digest:
        raise PlanError(
            f"plan: made for {plan.model.get('id')!r} with config digest "
            f"{plan.model.get('config_digest')}, but {where} has {digest}; make the plan from "
            "statistics of this model."
        )


def expert_counts(plan: "Plan") -> tuple[int, int]:
    """(experts, kept experts) of a layer, the same in all layers.

    Raises:
        PlanError: counts differ between layers, kept ids are invalid, or nothing is removed.
    """
    if not plan.layers:
        raise PlanError("plan: has no layers.")
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
    for what, counts in (
        ("has", {name: layer.num_experts for name, layer in plan.layers.items()}),
        ("keeps", {name: len(layer.kept) for name, layer in plan.layers.items()}),
    ):
        first = next(iter(counts))
        other = next((name for name in counts if counts[name] != counts[first]), None)
        if other is not None:
            raise PlanError(
                f"plan: {first!r} {what} {counts[first]} experts but {other!r} {what} "
                f"{counts[other]}; transformers "
                "and vLLM read one count for all layers, so use an allocation that keeps the same "
                "number everywhere."
            )
    layer = next(iter(plan.layers.values()))
    before, after = layer.num_experts, len(layer.kept)
    if before == after:
        raise PlanError(f"plan: removes none of {before} experts; use a ratio above 0.")
    return before, after


def check_layers(plan: "Plan", layers: Sequence[MoELayer]) -> tuple[str, ...]:
    """The plan covers the model's MoE layers, and the smaller model can route in each of them.

    Returns:
        Layers of the plan that the model does not have: MTP layers, or a mistake.

    Raises:
        PlanError: naming layer, counts and remedy.
    """
    for layer in layers:
        planned = plan.layers.get(layer.name)
        if planned is None:
            raise PlanError(
                f"plan: says nothing about {layer.name!r}, one of the model's {len(layers)} MoE "
                "layers; all of them share one count, so plan every one."
            )
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


def check_groups(layer: MoELayer, kept: Sequence[int]) -> None:
    """The layer's routing groups can choose among the kept experts.

    Groups are consecutive ids; membership survives only if every group keeps the same number.

    Raises:
        PlanError: they do not, or too few are left in a group.
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


def served_warning(after: int) -> str | None:
    """A warning when kernels of serving engines may not exist for this number of experts."""
    if is_served(after):
        return None
    return (
        f"{after} experts per layer is no multiple of {SERVED_STEP} (below it: no power of two); "
        "some serving engines "
        "have no kernel for such counts. transformers loads any."
    )
