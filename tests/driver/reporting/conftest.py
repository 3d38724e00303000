"""Statistics of a few layers, with or without folds, their plan and their reports; those of a
large model.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import make_plan
from reap_driver.planning.scoring import score
from reap_driver.reporting.page import write_report
from reap_kernels import LayerStats, SaliencyStats
from tests.driver.planning.statistics import MODEL, Rows, in_parts, model_stats

GROUPS = ["code", "tools"]
LAYERS = [f"model.layers.{number}.mlp.experts" for number in (3, 4, 5)]

Make = Callable[..., tuple[SaliencyStats, Plan]]


def observed(seed: int, groups: list[str]) -> SaliencyStats:
    """Statistics of three layers of 6 experts."""
    rows = {name: Rows(len(groups), seed + n, rows=400) for n, name in enumerate(LAYERS)}
    stats = model_stats(rows, groups)
    stats.provenance["data"] = [
        {"group": group, "source": f"/home/me/{group}.jsonl", "records": 10, "tokens": 100 * n}
        for n, group in enumerate(groups, start=1)
    ]
    return stats


def divided(groups: list[str]) -> SaliencyStats:
    """The same kind of statistics, in 8 folds."""
    return in_parts([observed(100 * n, groups) for n in range(8)])


def made(*, parts: bool = False, groups: list[str] = GROUPS) -> tuple[SaliencyStats, Plan]:
    """Statistics, optionally in 8 folds, and the plan that removes half of the experts."""
    stats = divided(groups) if parts else observed(0, groups)
    return stats, make_plan(score(stats), 0.5)


@pytest.fixture
def make() -> Make:
    """Makes statistics and a plan that only this test has; see `made`."""
    return made


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of statistics without folds and their plan; never changed."""
    folder = tmp_path_factory.mktemp("whole")
    stats, plan = made()
    write_report(stats, folder, plan)
    return folder


@pytest.fixture(scope="session")
def report_in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of statistics in folds and their plan; never changed."""
    folder = tmp_path_factory.mktemp("parts")
    stats, plan = made(parts=True)
    write_report(stats, folder, plan)
    return folder


def large(layers: int, experts: int, groups: list[str]) -> SaliencyStats:
    """Statistics of a large model: loads by Zipf's law, dead experts, specialists."""
    draw = torch.Generator().manual_seed(0)
    names = [f"model.layers.{number}.mlp.experts" for number in range(layers)]
    found = {}
    for name in names:
        size = (len(groups), experts)
        load = 1e6 / torch.arange(1, experts + 1).double()[torch.randperm(experts, generator=draw)]
        load = load * torch.exp(torch.randn(size, generator=draw).double())
        load[:, torch.rand(experts, generator=draw) < 0.02] = 0
        stats = LayerStats(experts, len(groups))
        stats.counts[0] = load.long()
        gate = torch.rand(size, generator=draw).double()
        norm = 1 + torch.rand(size, generator=draw).double()
        for field, factor in (
            ("router_weight_sum", gate),
            ("norm_sum", norm),
            ("weighted_norm_sum", gate * norm),
        ):
            getattr(stats, field).copy_(stats.count * factor)
        stats.tokens.fill_(10**7)
        found[name] = stats
    layer = {"num_experts": experts, "top_k": 8, "n_group": 1, "topk_group": 1}
    provenance = {"model": MODEL, "layers": dict.fromkeys(names, layer), "gate": "model"}
    return SaliencyStats(found, groups, provenance)
