"""Reference expert outputs in float64, from the formula f(x) = down(act(up(x)))."""

import torch
from torch import Tensor

from reap_kernels.types import ExpertWeights, Routing


def expert_outputs(hidden: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    """See `reap_kernels.experts.op.expert_outputs`; returns float64."""
    tokens = routing.gather_index // routing.top_k
    y = torch.zeros(len(tokens), hidden.shape[1], dtype=torch.float64, device=hidden.device)
    bounds = routing.offsets.tolist()
    for expert in range(experts.num_experts):
        rows = slice(bounds[expert], bounds[expert + 1])
        if rows.start < rows.stop:
            y[rows] = experts.project(expert, hidden[tokens[rows]].double())
    return y


def inner_outputs(hidden: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    """h(x) = act(up(x)) of the routed rows, by sorted row: [S, I] float64."""
    tokens = routing.gather_index // routing.top_k
    shape = (len(tokens), experts.intermediate_size)
    h = torch.zeros(shape, dtype=torch.float64, device=hidden.device)
    bounds = routing.offsets.tolist()
    for expert in range(experts.num_experts):
        rows = slice(bounds[expert], bounds[expert + 1])
        if rows.start < rows.stop:
            h[rows] = experts.inner(expert, hidden[tokens[rows]].double())
    return h
