"""CPU sort by expert: one stable sort of the expert ids."""

import torch
from torch import Tensor

from reap_kernels.types import Routing


def sort_by_expert(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int) -> Routing:
    """See `reap_kernels.sort.op.sort_by_expert`."""
    ids = topk_ids.reshape(-1).to(torch.int64)
    foreign = (ids < 0) | (ids >= num_experts)
    if topk_weights is not None:
        foreign |= topk_weights.reshape(-1) == 0
    # Foreign slots take the id E, so that the sort itself moves them to the tail.
    ids = ids.masked_fill(foreign, num_experts)
    gather_index = torch.sort(ids, stable=True).indices
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(ids, minlength=num_experts + 1)[:num_experts], 0, out=offsets[1:])
    return Routing(gather_index, offsets, topk_ids.shape[1])
