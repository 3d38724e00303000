"""What ranks of a vLLM server counted, merged: as one process would have counted it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import reap_kernels as rk
from reap_driver.integrations.vllm.ranks import merged
from reap_kernels.errors import DataError

EXPERTS, HIDDEN = 6, 4
GROUPS = ["all", "code"]


def observed(seed: int, *, only: range = range(EXPERTS)) -> rk.LayerStats:
    """Statistics of 40 random rows, of which the rank counts those of its own experts."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(40, HIDDEN, generator=draw)
    ids = torch.randint(EXPERTS, (40,), generator=draw)
    gates, groups = torch.rand(40, generator=draw), torch.randint(2, (40,), generator=draw)
    stats = rk.LayerStats(EXPERTS, len(GROUPS))
    own = torch.tensor([int(expert) in only for expert in ids])
    rk.accumulate(y, torch.where(own, ids, -1), gates, stats, group=groups)
    for group in range(len(GROUPS)):
        stats.add_tokens(20, group)
    return stats


@pytest.fixture
def answer(tmp_path: Path) -> Any:
    """An answer of `reap_statistics` with these layers."""

    def make(layers: dict[str, rk.LayerStats], share: str = "whole", **places: int) -> Any:
        path = tmp_path / "stats.safetensors"
        rk.SaliencyStats(layers, GROUPS).save(path)
        sizes = {"tp": 1, "pp": 1, "ep": 1, "dp": 1, "tp_rank": 0, "pp_rank": 0, "dp_rank": 0}
        return {"share": share, **sizes, **places, "file": path.read_bytes()}

    return make


def same(found: rk.LayerStats, expected: rk.LayerStats) -> None:
    for name, tensor in expected.fields().items():
        torch.testing.assert_close(getattr(found, name), tensor, rtol=1e-12, atol=0)


def test_one_rank(answer: Any) -> None:
    stats = merged([answer({"layer": observed(1)})])
    assert stats.groups == GROUPS
    same(stats.layers["layer"], observed(1))


def test_one_of_equal_tensor_parallel_ranks_is_taken(answer: Any) -> None:
    first = answer({"layer": observed(1)}, tp=2)
    second = {**first, "tp_rank": 1, "file": b""}  # such ranks send none
    same(merged([second, first]).layers["layer"], observed(1))


def test_expert_parallel_ranks_add_up(answer: Any) -> None:
    ranks = [
        answer({"layer": observed(1, only=range(3))}, "part", tp=2, ep=2),
        answer({"layer": observed(1, only=range(3, 6))}, "part", tp=2, ep=2, tp_rank=1),
    ]
    same(merged(ranks).layers["layer"], observed(1))


def test_refuses_expert_parallel_ranks_that_saw_other_tokens(answer: Any) -> None:
    more = observed(1, only=range(3, 6))
    more.add_tokens(1)
    ranks = [
        answer({"layer": observed(1, only=range(3))}, "part", tp=2, ep=2),
        answer({"layer": more}, "part", tp=2, ep=2, tp_rank=1),
    ]
    with pytest.raises(DataError, match=r"ranks counted \[20, 20\] and \[21, 20\] tokens by group"):
        merged(ranks)


def test_pipeline_ranks_have_different_layers(answer: Any) -> None:
    ranks = [
        answer({"layer.1": observed(2)}, pp=3, pp_rank=1),
        answer({"layer.0": observed(1)}, pp=3),
        answer({}, pp=3, pp_rank=2),  # a stage without MoE layers
    ]
    stats = merged(ranks)
    assert list(stats.layers) == ["layer.0", "layer.1"]
    same(stats.layers["layer.0"], observed(1))
    same(stats.layers["layer.1"], observed(2))


def test_engines_serve_different_requests(answer: Any) -> None:
    engines = [
        answer({"layer": observed(seed)}, dp=2, tp=2, dp_rank=engine, tp_rank=rank)
        for engine, seed in enumerate((1, 2))
        for rank in range(2)
    ]
    same(merged(engines).layers["layer"], observed(1).merge_(observed(2)))


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}, {"pp": 2}])
def test_refuses_where_a_rank_has_not_answered(answer: Any, sizes: dict[str, int]) -> None:
    alone = answer({"layer": observed(1)}, **sizes)
    with pytest.raises(DataError, match=r"1 of 2 ranks have answered .* ask each engine"):
        merged([alone])
    with pytest.raises(DataError, match="1 of 2 ranks have answered"):
        merged([alone, alone])
    with pytest.raises(DataError, match="no rank has answered"):
        merged([])


def test_refuses_a_damaged_file(answer: Any) -> None:
    damaged = answer({"layer": observed(1)})
    damaged["file"] = damaged["file"][:-8]
    with pytest.raises(DataError):
        merged([damaged])
