"""Which numbers of experts in a layer, and of neurons in an expert, serving engines take, and
advice where one takes others.

vLLM and SGLang serve any number: their grouped products align the tokens of up to 991 experts, and
their routers have a general kernel beside those for single numbers (published checkpoints keep 103,
173 or 180 experts). A tuned launch table is looked up by the number of experts, and default tiles
take its place, whatever other number is left. One router has no general kernel: that of scores
sqrt(softplus(x)), DeepSeek-V4's, where vLLM 0.26 ends with `Unsupported expert number`
(github.com/vllm-project/vllm/issues/51521).

Tensor parallelism divides the neurons of every expert: both engines refuse a width that the number
of GPUs does not divide, and, in FP8 with a scale per block of 128, one whose part on each GPU is no
multiple of 128 (github.com/vllm-project/vllm/issues/54178). transformers' grouped products need
rows of 16 bytes, 8 neurons of 2 bytes.
"""

import math
from collections.abc import Mapping
from typing import Any

from reap_driver.planning.budget import Router, nearest, ratio_of
from reap_driver.planning.plan import Plan

_USUAL_WIDTH = 64  # a multiple of it are the experts of published models
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
    """For each number of experts that an engine refuses, the ratios of the nearest it takes; and
    for each width that fewer GPUs can divide than before, how many.

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
    return [*found.values(), *_width_advice(plan)]


def _width_advice(plan: Plan) -> list[str]:
    """What a width costs that is a multiple of less than the one before."""
    found = []
    widths = {(la.width, la.narrow_width) for la in plan.layers.values()}
    for before, after in sorted((b, a) for b, a in widths if b is not None and a is not None):
        parts = math.gcd(after, _USUAL_WIDTH)
        if parts < math.gcd(before, _USUAL_WIDTH):
            rows = "" if parts % 8 == 0 else ", and transformers' grouped products a multiple of 8"
            found.append(
                f"leaves {after} of {before} neurons in an expert: by tensor parallelism vLLM and "
                f"SGLang divide them among at most {parts} GPUs (a power of two), and FP8 blocks "
                f"need a multiple of 128 on each{rows}; plan with `width_multiple={_USUAL_WIDTH}`, "
                "or 128 times the number of GPUs"
            )
    return found
