"""Checks of a plan against the model it is applied to, before anything is written."""

from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from reap_driver.compat.models import config_digest
from reap_kernels.errors import PlanError, UnsupportedModel

if TYPE_CHECKING:
    from reap_driver.plan import Plan

_TOP_K_FIELDS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
)
# Attention that mixes experts of its own under the same count: its experts are not observed, yet
# would be cut.
_REFUSED = {"jetmoe": "its attention has experts too, and one field counts both"}
# Expert counts that serving kernels are commonly instantiated for: powers of two up to 64, then
# multiples of 64.
_SERVED_STEP = 64


def check_model(plan: "Plan", config: PretrainedConfig, where: object) -> None:
    """The plan was made for this model, and the model can be pruned by files.

    Raises:
        PlanError: the plan is another model's.
        UnsupportedModel: a model whose count also governs something else.
    """
    if config.model_type in _REFUSED:
        raise UnsupportedModel(
            f"{where}: {config.model_type} cannot be pruned by files: "
            f"{_REFUSED[config.model_type]}."
        )
    digest = config_digest(config)
    if plan.model.get("config_digest") != digest:
        raise PlanError(
            f"plan: made for {plan.model.get('id')!r} with config digest "
            f"{plan.model.get('config_digest')}, but "
            f"{where} has {digest}; make the plan from statistics of this model."
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


def check_routing(config: PretrainedConfig, plan: "Plan") -> None:
    """The smaller model can route: enough experts for top-k, and equal groups where groups are
    used.

    Raises:
        PlanError: naming layer, counts and remedy.
    """
    text: Any = config.get_text_config()
    before, after = expert_counts(plan)
    top_k = max((_largest(getattr(text, f, None)) for f in _TOP_K_FIELDS), default=0)
    if after < top_k:
        raise PlanError(
            f"plan: keeps {after} experts, but a token is routed to {top_k}; lower the ratio to "
            f"{1 - top_k / before:.3g} or less."
        )
    groups = getattr(text, "n_group", None) or 1
    if groups > 1 and before % groups == 0:
        _check_groups(plan, before, groups, getattr(text, "topk_group", None) or groups, top_k)


def served_warning(after: int) -> str | None:
    """A warning when kernels of serving engines may not exist for this number of experts."""
    served = after % _SERVED_STEP == 0 if after > _SERVED_STEP else after & (after - 1) == 0
    if served:
        return None
    return (
        f"{after} experts per layer is no multiple of {_SERVED_STEP} (below it: no power of two); "
        "some serving engines "
        "have no kernel for such counts. transformers loads any."
    )


def _check_groups(plan: "Plan", before: int, groups: int, topk_group: int, top_k: int) -> None:
    """Groups are consecutive ids; membership survives only if every group keeps the same number."""
    size = before // groups
    for name, layer in plan.layers.items():
        counts = [0] * groups
        for expert in layer.kept:
            counts[expert // size] += 1
        if len(set(counts)) > 1:
            raise PlanError(
                f"plan: layer {name!r} keeps {counts} experts in its {groups} routing groups; "
                "they must be equal, so plan with group-limited allocation."
            )
        if counts[0] < min(2, size) or topk_group * counts[0] < top_k:
            raise PlanError(
                f"plan: layer {name!r} keeps {counts[0]} experts in each of {groups} groups; "
                "routing takes the top 2 of "
                f"a group and needs {top_k} experts in {topk_group} groups; lower the ratio."
            )


def _largest(value: Any) -> int:
    """A count that may be given per layer."""
    values = value if isinstance(value, list | tuple) else [value]
    return max((v for v in values if isinstance(v, int)), default=0)
