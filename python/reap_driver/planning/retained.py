"""How much of the routing of a model a plan keeps, from its statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.planning.plan import Plan
from reap_kernels import SaliencyStats
from reap_kernels.errors import PlanError


@dataclass(frozen=True)
class Retained:
    """What one layer's kept experts did in the original model. Shares are in [0, 1], and 1 where no
    token was routed.

    Attributes:
        router_weight_share: their share of the sum of router weights.
        selection_share: their share of the slots (token, expert) that tokens were routed to.
        saliency_share: their share of the sum of g ||f||, which the `reap` criterion averages.
        dead_kept: ids of kept experts that no token reached.
        dead_removed: ids of removed experts that no token reached.
    """

    router_weight_share: float
    selection_share: float
    saliency_share: float
    dead_kept: tuple[int, ...]
    dead_removed: tuple[int, ...]


@typed
def retained(stats: SaliencyStats, plan: "Plan") -> dict[str, Retained]:
    """How much of the routing observed in the original model goes to the experts a plan keeps.

    Args:
        stats: statistics of the original model; all groups are added up.
        plan: a plan for the same model.

    Returns:
        Layer -> shares, for the layers of the plan that were observed, in the plan's order. Each
        has `router_weight_share`, `selection_share` and `saliency_share` in [0, 1], and the ids
        `dead_kept` and `dead_removed`.

    Raises:
        PlanError: a layer has another number of experts in the plan than in the statistics, or no
            layer of the plan was observed.

    Example:
        >>> shares = rd.retained(stats, plan)
        >>> list(shares) == list(plan.layers)
        True
    """
    found = {}
    for name, layer in plan.layers.items():
        if name not in stats.layers:
            continue
        total = stats.layers[name].total().to("cpu")
        check_count(name, layer.num_experts, total.num_experts)
        kept = torch.tensor(layer.kept)
        count = total.count[0]
        dead = set((count == 0).nonzero().flatten().tolist())
        found[name] = Retained(
            router_weight_share=_share(total.router_weight_sum[0], kept),
            selection_share=_share(count, kept),
            saliency_share=_share(total.weighted_norm_sum[0], kept),
            dead_kept=tuple(e for e in layer.kept if e in dead),
            dead_removed=tuple(e for e in layer.removed if e in dead),
        )
    if not found:
        raise PlanError(
            f"plan: names none of the {len(stats.layers)} layers of the statistics; use statistics "
            "of the model the plan was made for"
        )
    return found


def check_count(name: str, planned: int, experts: int) -> None:
    """Raises PlanError unless plan and model have the same number of experts in a layer."""
    if planned != experts:
        raise PlanError(
            f"plan: has {planned} experts in {name!r}, but the original has {experts}; use the "
            "plan that was made for this model"
        )


def _share(values: Tensor, kept: Tensor) -> float:
    """Share of the sum of values [E] at the ids `kept`; 1 if the sum is 0."""
    total = float(values.sum())
    return float(values[kept].sum()) / total if total else 1.0
