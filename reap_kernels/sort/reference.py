"""Reference sort by expert, from the definition: list each expert's slots in ascending order."""

import torch
from torch import Tensor

from reap_kernels.types import Routing


def sort_by_expert(topk_ids: Tensor, topk_weights: Tensor | None, num_experts: int) -> Routing:
    """See `reap_kernels.sort.op.sort_by_expert`; one pass per expert, for clarity, not speed."""
    ids = topk_ids.reshape(-1).to(torch.int64)
    served = (ids >= 0) & (ids < num_experts)
    if topk_weights is not None:
        served &= topk_weights.reshape(-1) != 0
    rows = [((ids == expert) & served).nonzero().flatten() for expert in range(num_experts)]
    sizes = torch.tensor([0, *(len(r) for r in rows)], device=ids.device)
    gather_index = torch.cat([*rows, (~served).nonzero().flatten()])
    return Routing(gather_index, sizes.cumsum(0), topk_ids.shape[1])
