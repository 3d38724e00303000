"""Which numbers of experts in a layer serving engines take, and advice where one takes others.

vLLM and SGLang serve any number: their grouped products align the tokens of up to 991 experts, and
their routers have a general kernel beside those for single numbers (published checkpoints keep 103,
173 or 180 experts). A tuned launch table is looked up by the number of experts, and default tiles
take its place, whatever other number is left. One router has no general kernel: that of scores
sqrt(softplus(x)), DeepSeek-V4's, where vLLM 0.26 ends with `Unsupported expert number`
(github.com/vllm-project/vllm/issues/51521).
"""

from collections.abc import Mapping
from typing import Any

from reap_driver.planning.budget import Router, nearest, ratio_of
from reap_driver.planning.plan import Plan

# model_type -> numbers of experts that its router's kernels are compiled for.
_ROUTERS = {"deepseek_v4": frozenset({*(1 << n for n in range(8)), *range(192, 577, 64)})}


def is_served(experts: int, model_type: str | None) -> bool:
    """Whether vLLM and SGLang serve a model of this type with so many experts in each layer.

    Example:
        >>> is_served(173, "step3p5"), is_served(144, "deepseek_v4")
        (True, False)
    """
    return model_type not in _ROUTERS or experts in _ROUTERS[model_type]


def served_advice(plan: Plan, layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """For each number of experts that an engine refuses, the ratios of the nearest it takes.

    Args:
        plan: one that leaves layers of different numbers is refused as a whole, so nothing is said.
        layers: facts of each layer, as the provenance of statistics records them.

    Raises:
        PlanError: the facts of a layer do not say how it routes.
    """
    kind = plan.model.get("model_type")
    found: dict[tuple[int, int], str] = {}
    for name, layer in plan.layers.items() if plan.uniform and kind in _ROUTERS else ():
        kept, total = len(layer.kept), layer.num_experts
        if name not in layers or not layer.removed or is_served(kept, kind):
            continue
        router = Router.of(name, layers[name])
        held = plan.settings.get("protected", {}).get(name, ())
        possible = range(total - router.most(held), total)
        fit = [n for n in possible if is_served(n, kind) and n % router.n_group == 0]
        offers = [f"{n} (ratio {ratio_of(total - n, total):g})" for n in nearest(fit, kept)]
        found[kept, total] = (
            f"keeps {kept} of {total} experts in a layer, a number that vLLM's router for {kind} "
            f"refuses; it takes {' or '.join(offers) or 'none that this layer can be left with'}"
        )
    return list(found.values())
