"""CPU saliency: per-row measures of expert outputs, then one ordered reduction in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels.stats import LayerStats


@dataclass(slots=True)
class RowMeasures:
    """Per routed row: norm ||f||, largest and smallest element of f; each [S]."""

    norm: Tensor
    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, y: Tensor) -> "RowMeasures":
        """Measures of rows `y` [n, H], in float64 for float64 outputs, else in float32."""
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(y, dim=1, dtype=dtype)
        return cls(norm, y.amax(dim=1), y.amin(dim=1))

    @classmethod
    def joined(cls, parts: "list[RowMeasures]") -> "RowMeasures":
        """Measures of all parts' rows, in order."""
        if not parts:
            return cls(*(torch.empty(0) for _ in range(3)))
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in cls.__slots__))


def reduce_rows(
    rows: RowMeasures,
    key: Tensor,
    router_weights: Tensor,
    counted: Tensor | None,
    stats: LayerStats,
) -> None:
    """Adds measured rows to the statistics.

    Args:
        rows: measures of S rows.
        key: [S] int64, group * E + expert of each row.
        router_weights: [S] router weights.
        counted: [S] bool, or None for all.
        stats: added to in place. Sums run over the rows in order: same bits run to run.
    """
    norm, high, low = rows.norm, rows.high, rows.low
    if counted is not None and not bool(counted.all()):
        key, router_weights, norm = key[counted], router_weights[counted], norm[counted]
        high, low = high[counted], low[counted]
    size = stats.num_groups * stats.num_experts
    finite = torch.isfinite(norm)
    if not bool(finite.all()):
        stats.nonfinite.view(-1).add_(torch.bincount(key[~finite], minlength=size))
        key, router_weights, norm = key[finite], router_weights[finite], norm[finite]
        high, low = high[finite], low[finite]
    norm, weight = norm.double(), router_weights.double()
    weighted = weight * norm
    values = torch.stack((weight, norm, weighted, norm * norm, weighted * weighted))
    # One call for all sums: in a small layer the number of calls is what takes time.
    added = torch.zeros(len(values), size, dtype=torch.float64)
    added.scatter_add_(1, key.expand(len(values), -1), values)
    stats.sums.view(len(values), size).add_(added)
    stats.count.view(-1).add_(torch.bincount(key, minlength=size))
    stats.out_max.view(-1).scatter_reduce_(0, key, high.float(), "amax")
    stats.out_min.view(-1).scatter_reduce_(0, key, low.float(), "amin")


def accumulate(
    y: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    stats: LayerStats,
    mask: Tensor | None,
    group: int | Tensor,
) -> None:
    """See `reap_kernels.saliency.op.accumulate`."""
    counted = (expert_ids >= 0) & (expert_ids < stats.num_experts) & (router_weights != 0)
    if mask is not None:
        counted &= mask
    key = group * stats.num_experts + expert_ids.to(torch.int64)
    reduce_rows(RowMeasures.of(y), key, router_weights, counted, stats)
