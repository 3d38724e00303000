"""Random statistics of a model that does not exist, with the rows they are of, for oracles."""

import functools

import torch
from torch import Tensor

from reap_kernels import LayerStats, SaliencyStats

EXPERTS = 6
NEVER = 4  # an expert nothing is routed to
MODEL = {"id": "some/model", "config_digest": "sha256:0", "model_type": "m", "architecture": "M"}


class Rows:
    """Rows (group, expert, gate, norm, extremes) of one layer, and their statistics.

    Attributes:
        group, expert: [S] int64.
        gate, norm: [S] float64.
        high, low: [S] float32, extreme elements of each output.
        tokens: [G] int64.
    """

    def __init__(self, groups: int, seed: int, rows: int = 60) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.group = torch.randint(groups, (rows,), generator=draw)
        self.expert = torch.randint(EXPERTS, (rows,), generator=draw)
        self.expert[self.expert == NEVER] = NEVER - 1
        self.gate = torch.rand(rows, generator=draw, dtype=torch.float64)
        self.norm = torch.rand(rows, generator=draw, dtype=torch.float64) * 10
        self.high = torch.rand(rows, generator=draw)
        self.low = -3 * torch.rand(rows, generator=draw)
        self.tokens = torch.randint(10, 90, (groups,), generator=draw)
        self.tokens += self.group.bincount(minlength=groups)

    def stats(self) -> LayerStats:
        """The statistics an observation of these rows leaves."""
        stats = LayerStats(EXPERTS, len(self.tokens))
        stats.tokens.copy_(self.tokens)
        at = (self.group, self.expert)
        sums = {
            "count": torch.ones_like(self.group),
            "router_weight_sum": self.gate,
            "norm_sum": self.norm,
            "weighted_norm_sum": self.gate * self.norm,
            "norm_sq_sum": self.norm**2,
            "weighted_norm_sq_sum": (self.gate * self.norm) ** 2,
        }
        for name, values in sums.items():
            getattr(stats, name).index_put_(at, values, accumulate=True)
        for row in range(len(self.group)):
            place = (self.group[row], self.expert[row])
            stats.out_max[place] = max(stats.out_max[place], self.high[row])
            stats.out_min[place] = min(stats.out_min[place], self.low[row])
        return stats

    def of(self, expert: int) -> Tensor:
        """Which rows are an expert's."""
        return self.expert == expert


def model_stats(rows: dict[str, Rows], groups: list[str], **facts: int) -> SaliencyStats:
    """Statistics of a model with these layers; `facts` go into every layer's provenance."""
    layer = {"num_experts": EXPERTS, "top_k": 2, "n_group": 1, "topk_group": 1, **facts}
    provenance = {"model": MODEL, "layers": dict.fromkeys(rows, layer), "gate": "model"}
    return SaliencyStats({n: r.stats() for n, r in rows.items()}, groups, provenance)


def in_parts(parts: list[SaliencyStats]) -> SaliencyStats:
    """The merge of some statistics, which are its parts."""
    whole = functools.reduce(SaliencyStats.merge, parts)
    return SaliencyStats(whole.layers, whole.groups, parts[0].provenance, parts)
