"""Reference saliency in float64, from the formulas: per expert, sums over the rows routed to it."""

import torch
from torch import Tensor

from reap_kernels.stats import LayerStats


def accumulate(
    y: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    stats: LayerStats,
    mask: Tensor | None,
    group: int | Tensor,
) -> None:
    """See `reap_kernels.saliency.op.accumulate`."""
    group = group if isinstance(group, Tensor) else torch.full_like(expert_ids, group)
    counted = torch.ones_like(expert_ids, dtype=torch.bool) if mask is None else mask
    counted = counted & (router_weights != 0)
    for which in range(stats.num_groups):
        for expert in range(stats.num_experts):
            rows = counted & (expert_ids == expert) & (group == which)
            f, g = y[rows].double(), router_weights[rows].double()
            finite = torch.isfinite(f.norm(dim=1))
            stats.nonfinite[which, expert] += int((~finite).sum())
            f, g = f[finite], g[finite]
            if len(f) == 0:
                continue
            norm = f.square().sum(dim=1).sqrt()
            stats.count[which, expert] += len(f)
            stats.router_weight_sum[which, expert] += g.sum()
            stats.norm_sum[which, expert] += norm.sum()
            stats.weighted_norm_sum[which, expert] += (g * norm).sum()
            stats.norm_sq_sum[which, expert] += norm.square().sum()
            stats.weighted_norm_sq_sum[which, expert] += (g * norm).square().sum()
            high, low = stats.out_max[which, expert], stats.out_min[which, expert]
            high.copy_(torch.maximum(high, f.max().float()))
            low.copy_(torch.minimum(low, f.min().float()))
