"""Reference cross moments in float64, from the formula: per expert, one product over its rows."""

from torch import Tensor

from reap_kernels.experts import reference as experts_reference
from reap_kernels.sort import reference as sort_reference
from reap_kernels.types import ExpertWeights


def cross(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: ExpertWeights,
    targets: Tensor,
    out: Tensor,
) -> None:
    """See `reap_kernels.cross.op.cross`; masked tokens have weights of 0."""
    routing = sort_reference.sort_by_expert(topk_ids, topk_weights, experts.num_experts)
    h = experts_reference.inner_outputs(hidden, routing, experts)
    weight = topk_weights.reshape(-1)[routing.gather_index].double()
    target = targets[routing.gather_index // routing.top_k].double() * weight[:, None]
    bounds = routing.offsets.tolist()
    for expert in range(experts.num_experts):
        rows = slice(bounds[expert], bounds[expert + 1])
        out[expert] += target[rows].T @ h[rows]
