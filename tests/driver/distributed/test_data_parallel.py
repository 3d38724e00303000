"""Ranks that share the batches give the statistics of one process."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from reap_driver.observation import data_parallel
from reap_driver.observation.data_parallel import Ranks, ranks
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import BackendUnavailable, DataError, ReapError
from reap_kernels.stats import COUNTS, EXTREMA, SUMS
from tests.driver.distributed import shares
from tests.driver.distributed.launch import ranked


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of worlds of 2 and 3 ranks."""
    out = tmp_path_factory.mktemp("shares")
    for size in (2, 3):
        folder = out / str(size)
        folder.mkdir()
        ended = ranked(size, partial(shares.main, folder))
        assert ended.code == 0, ended.err
    return out


@pytest.fixture(params=[2, 3])
def world(request: pytest.FixtureRequest, folders: Path) -> Path:
    """The folder with the results of 2 or 3 ranks."""
    return folders / str(request.param)


def _size(world: Path) -> int:
    return int(world.name)


def _same(mine: SaliencyStats, one: SaliencyStats) -> None:
    """Counts and extrema are equal, sums up to the rounding of their order."""
    assert list(mine.layers) == list(one.layers)
    assert mine.groups == one.groups
    for name, layer in one.layers.items():
        got, want = mine.layers[name].fields(), layer.fields()
        for key in (*COUNTS, *EXTREMA, "tokens"):
            assert torch.equal(got[key], want[key]), (name, key)
        for key in SUMS:
            torch.testing.assert_close(got[key], want[key], rtol=1e-12, atol=0)


def _timeless(stats: SaliencyStats) -> dict[str, object]:
    return {key: value for key, value in stats.provenance.items() if key != "created"}


def test_equal_to_one_process(world: Path) -> None:
    """Groups of five batches and of one; the provenance is that of one process."""
    merged, one = SaliencyStats.load(world / "first"), shares.observed("qwen3_moe", Ranks())
    assert int(one.layers[next(iter(one.layers))].tokens.sum()) == 6 * 24
    _same(merged, one)
    assert _timeless(merged) == _timeless(one)


def test_same_bits_in_two_runs(world: Path) -> None:
    first, second = (SaliencyStats.load(world / run) for run in ("first", "second"))
    for name, layer in first.layers.items():
        for key, value in layer.fields().items():
            assert torch.equal(value, second.layers[name].fields()[key]), (name, key)


def test_ranks_without_batches(world: Path) -> None:
    """Their empty layers add nothing; the vision experts that no token reached stay left out."""
    merged, one = SaliencyStats.load(world / "idle"), shares.idle("ernie4_5_vl_moe", Ranks())
    assert len(one.provenance["unobserved"]) == 2
    _same(merged, one)
    assert _timeless(merged) == _timeless(one)


def test_ranks_that_reached_different_layers(world: Path) -> None:
    """All layers are in the model's order; unreached ones are named; int64 counts are exact."""
    merged, size = SaliencyStats.load(world / "by_hand"), _size(world)
    names = [f"layer.{i}" for i in range(size)]
    assert sorted(merged.layers) == names
    assert [int(merged.layers[name].count[0, 1]) for name in names] == [
        2**53 - 1 - rank for rank in range(size)
    ]
    assert [float(merged.layers[name].out_max[0, 1]) for name in names] == list(range(size))
    assert merged.provenance["unobserved"] == [f"layer.{size}"]
    assert sorted(merged.provenance["layers"]) == names
    assert merged.provenance["backend"] == ("cpu+reference", "cpu+reference+triton")[size - 2]
    assert merged.provenance["created"] == "by 0"


def test_refusals_are_the_same_on_every_rank(world: Path) -> None:
    """Different groups, then different models: refused on every rank, which can go on."""
    files = list(world.glob("said*"))
    said = {file.read_text() for file in files}
    assert (len(files), len(said)) == (_size(world), 1)
    groups, model = said.pop().splitlines()
    assert "groups is ['group 0'] on rank 0 and ['group 1'] on rank 1; enter every group" in groups
    assert "model is '0' on rank 0 and '1' on rank 1; give every rank the same model" in model


def test_a_rank_that_waits_for_one_that_left_says_so(world: Path) -> None:
    """Without torchrun to end it."""
    said = (world / "lost").read_text()
    assert said.startswith(f"rank 0 of {_size(world)} waits for ranks that have ended")
    assert said.endswith("the rank that failed says why: look for its message above")


def _failing() -> int:
    """Rank 1 fails while the others wait for its statistics."""
    try:
        with ranks() as world:
            if world.rank == 1:
                raise DataError("the batch of rank 1 holds token id 7")
            world.merged(SaliencyStats({"layer": LayerStats(2)}, ["default"]))
    except ReapError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def test_a_failing_rank_ends_the_run_with_its_own_error() -> None:
    """The others wait in a collective: they print no traceback, and torchrun names the cause."""
    ended = ranked(2, _failing)
    assert ended.code == 1
    assert ended.err.count("error: the batch of rank 1 holds token id 7") == 1
    assert "waits for ranks" not in ended.err
    assert "reap_driver/observation/data_parallel.py" not in ended.err
    cause = ended.err.partition("Root Cause (first observed failure)")[2]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "exitcode  : 3" in cause


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_every_batch_once(size: int) -> None:
    shared = [Ranks(rank, size).share(5) for rank in range(size)]
    assert sorted(index for share in shared for index in share) == list(range(5))
    assert max(map(len, shared)) - min(map(len, shared)) <= 1


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without the variables of torchrun."""
    for name in (*data_parallel._VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_without_torchrun(bare: pytest.MonkeyPatch) -> None:
    """Nothing is connected, and the statistics are not copied."""
    stats = SaliencyStats({}, ["default"])
    with ranks() as world:
        assert world == Ranks(0, 1, 0)
        assert not torch.distributed.is_initialized()
        assert world.merged(stats) is stats
        world.barrier()


def _set(bare: pytest.MonkeyPatch, **values: str) -> None:
    known = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in {**known, "MASTER_PORT": "0", **values}.items():
        bare.setenv(name, value)


def test_half_an_environment_is_refused(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("RANK", "0")
    bare.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(DataError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start all"),
        ranks(),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, value)
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE")
            for value in ("two", "-1", "1.5", "1_0", "9" * 30)
        ],
        ("WORLD_SIZE", "0"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("MASTER_PORT", "65536"),
    ],
)
def test_numbers_that_torchrun_would_not_set(
    bare: pytest.MonkeyPatch, name: str, value: str
) -> None:
    _set(bare, **{name: value})
    with pytest.raises(DataError, match=rf"^{name}='?{value}'?[ :].*torchrun"), ranks():
        pass


def test_ranks_that_cannot_meet(bare: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.distributed.DistNetworkError("address already in use\nframes")

    _set(bare, MASTER_PORT="1")
    bare.setattr(torch.distributed, "init_process_group", refuse)
    says = (
        r"^MASTER_ADDR:MASTER_PORT=localhost:1: cannot connect the ranks there \(address already in"
    )
    with pytest.raises(DataError, match=says), ranks():
        pass


def test_a_torch_without_gloo_is_refused(bare: pytest.MonkeyPatch) -> None:
    _set(bare, WORLD_SIZE="2")
    bare.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="cannot run with WORLD_SIZE=2; unset it"), ranks():
        pass


def test_a_process_group_that_exists_is_left_alone(bare: pytest.MonkeyPatch) -> None:
    """Ours is separate and is destroyed afterwards; the existing one still works."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with ranks() as world:
            assert world == Ranks(0, 1, 0)
            assert world._group is not torch.distributed.group.WORLD
            ours = world._group
        assert torch.distributed.is_initialized()
        with pytest.raises(ValueError, match="not initialized"):
            torch.distributed.get_backend(ours)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
