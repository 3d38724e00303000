"""Expert parallelism over two ranks: whole experts are observed, parts of experts refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from reap_kernels import SaliencyStats
from reap_kernels.stats import COUNTS, EXTREMA, SUMS
from tests.driver import zoo
from tests.driver.distributed import spread
from tests.driver.distributed.launch import ranked

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator(check_available=False) is not None,
    reason="transformers distributes models over the accelerators that torch is built for",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two ranks."""
    out = tmp_path_factory.mktemp("spread")
    ended = ranked(2, partial(spread.main, out))
    assert ended.code == 0, ended.err
    return out


def _timeless(stats: SaliencyStats) -> dict[str, Any]:
    return {key: value for key, value in stats.provenance.items() if key != "created"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", spread.OBSERVED)
def test_expert_parallel_is_observed_whole(folder: Path, name: str, rank: int) -> None:
    """Every rank has the statistics of all experts, with the provenance of one process."""
    many = SaliencyStats.load(folder / f"{name}.{rank}")
    cls = type(zoo.tiny(name)[1])
    one = spread.statistics(name, spread.loaded(cls, folder / name))
    assert list(many.layers) == list(one.layers)
    assert many.groups == one.groups == ["code", "chat", "masked"]
    assert _timeless(many) == _timeless(one)
    for layer, want in one.layers.items():
        fields, got = want.fields(), many.layers[layer].fields()
        assert want.tokens.tolist() == [24, 19, 24]
        assert want.count.sum(dim=1).tolist() == [24 * 3, 19 * 3, 24 * 3]
        assert {*want.count[2].nonzero().flatten().tolist()} <= {*spread.KEPT}
        for key in (*COUNTS, "tokens"):
            assert torch.equal(got[key], fields[key]), (layer, key)
        for key in (*SUMS, *EXTREMA):
            torch.testing.assert_close(got[key], fields[key], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_layers_say_which_experts_are_here(folder: Path, rank: int) -> None:
    said = (folder / f"qwen3_moe.local.{rank}").read_text()
    assert said == " ".join([f"ExpertSlice(first={4 * rank}, count=4)"] * 2)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tokens", "counted [48] tokens, [47] tokens; give every rank the same batches"),
        ("groups", "counted 1 groups, 2 groups; give every rank the same batches"),
    ],
)
def test_ranks_that_counted_differently_are_refused(folder: Path, what: str, message: str) -> None:
    """The error is raised on every rank and names the layer."""
    for rank in range(2):
        said = (folder / f"different {what}.{rank}").read_text()
        assert said.startswith("model.layers.0.mlp.experts: its expert-parallel ranks")
        assert message in said


@pytest.mark.parametrize(
    ("case", "start", "remedy"),
    [
        (
            "tensor parallel",
            "model.layers.0.mlp.experts.gate_up_proj is sharded ((_StridedShard(dim=1",
            "load the model without tensor parallelism",
        ),
        (
            "sharded data parallel",
            "model.layers.0.mlp.experts.gate_up_proj is sharded ((Shard(dim=0),))",
            "or FSDP",
        ),
        (
            "expert parallel outside the interface",
            "model.layers.1.mlp.experts.gate_up_proj is sharded by expert",
            "load the model without expert parallelism",
        ),
    ],
)
def test_what_cannot_be_observed_is_refused(
    folder: Path, case: str, start: str, remedy: str
) -> None:
    """Loaded by transformers, the error on every rank names the layer and the remedy."""
    for rank in range(2):
        said = (folder / f"{case}.{rank}").read_text()
        assert said.startswith(start)
        assert remedy in said
        assert "\n" not in said
        assert len(said) < 400
