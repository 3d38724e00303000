"""Folds: the statistics of all data do not depend on them, and parts equal those of each
fold alone.
"""

from functools import reduce
from pathlib import Path

import pytest
import torch

from reap_driver.base.interrupts import Stop
from reap_driver.data.batches import PackedBatches
from reap_driver.data.folds import FoldedBatches
from reap_driver.data.packing import PackedSource
from reap_driver.data.source import DataSource
from reap_driver.load.resident import load_model
from reap_driver.load.streamed_model import open_streamed
from reap_driver.observation.observer import Observer, observe
from reap_driver.observation.run import Run, run_resident, run_streamed
from reap_driver.observation.state_store import StateStore
from reap_kernels import LayerStats, SaliencyStats
from tests.driver.cli.conftest import write_model

CPU = torch.device("cpu")
FOLDS = 3


def source(group: str, tokens: int, seed: int) -> PackedSource:
    """Random ids in sequences of 8."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (tokens,), generator=rng, dtype=torch.int32)
    start = torch.zeros(1, dtype=torch.int64)
    return PackedSource(DataSource(Path(group), group), ids, start, None, 1, 8, 0, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("folds") / "model", "qwen3_moe")


@pytest.fixture
def sources() -> list[PackedSource]:
    """Ten sequences and a shorter one; two; and five more of the first group."""
    return [source("code", 84, 0), source("text", 16, 1), source("code", 40, 2)]


def folded(sources: list[PackedSource], folds: int) -> FoldedBatches:
    return FoldedBatches(PackedBatches(sources, [1] * len(sources), folds=folds))


def run(observer: Observer, batches: FoldedBatches) -> Run:
    """Observes all batches after entering every group, as the command line does."""
    for group in batches.groups:
        with observer.group(group):
            observer.group_index()
    return Run(observer, batches, range(len(batches.batches)), Stop())


def resident(folder: Path, batches: FoldedBatches) -> SaliencyStats:
    observer = observe(load_model(folder))
    run_resident(run(observer, batches))
    return batches.merged(observer.stats)


def assert_close(mine: SaliencyStats, theirs: SaliencyStats) -> None:
    """Counts and extrema are equal, sums to within 1e-12."""
    assert mine.groups == theirs.groups
    assert list(mine.layers) == list(theirs.layers)
    for name, layer in mine.layers.items():
        other = theirs.layers[name]
        assert torch.equal(layer.counts, other.counts)
        assert torch.equal(layer.tokens, other.tokens)
        assert torch.equal(layer.extrema, other.extrema)
        torch.testing.assert_close(layer.sums, other.sums, rtol=1e-12, atol=0)


def test_the_whole_is_that_without_folds(folder: Path, sources: list[PackedSource]) -> None:
    whole, plain = (resident(folder, folded(sources, folds)) for folds in (FOLDS, 1))
    assert_close(whole, plain)
    assert len(whole.parts) == FOLDS
    assert plain.parts == []
    assert_close(reduce(SaliencyStats.merge, whole.parts), whole)


def test_a_part_is_its_fold_observed_alone(folder: Path, sources: list[PackedSource]) -> None:
    """The second of three folds has the sequences 1, 4, 7, 10 of 11, 1 of 2, and 1, 4 of 5."""
    parts = resident(folder, folded(sources, FOLDS)).parts
    model = load_model(folder)
    for fold, part in enumerate(parts):
        observer = observe(model)
        for made in sources:
            with observer, observer.group(made.source.group):
                observer.group_index()
                for row in range(fold, made.sequences, FOLDS):
                    begin, end = made.bounds[row], made.bounds[row + 1]
                    observer(input_ids=made.ids[None, begin:end].long())
        assert_close(part, observer.stats)


def test_streamed_layers_give_the_same_parts(folder: Path, sources: list[PackedSource]) -> None:
    batches = folded(sources, FOLDS)
    want = resident(folder, batches)
    with open_streamed(folder) as opened:
        observer = observe(opened.model)
        run_streamed(run(observer, batches), opened, StateStore("device", CPU, None))
        got = batches.merged(observer.stats)
    for mine, theirs in zip([got, *got.parts], [want, *want.parts], strict=True):
        for name, layer in mine.layers.items():
            for field, value in layer.fields().items():
                assert torch.equal(value, theirs.layers[name].fields()[field])


def test_a_source_of_fewer_sequences_leaves_parts_without_it(
    folder: Path, sources: list[PackedSource]
) -> None:
    """The third part has no data of group text, but still has the group."""
    parts = resident(folder, folded(sources, FOLDS)).parts
    tokens = [next(iter(part.layers.values())).tokens.tolist() for part in parts]
    assert [part.groups for part in parts] == [["code", "text"]] * FOLDS
    assert [text for _, text in tokens] == [8, 8, 0]
    assert sum(code for code, _ in tokens) == 124


def test_groups_are_in_the_order_of_sources() -> None:
    """Groups are matched by name, whatever their order in the observer."""
    batches = folded([source("b", 16, 0), source("a", 16, 1)], 2)
    order = [3, 0, 2, 1]
    names = [batches.groups[i] for i in order]
    layer = LayerStats(2, 4)
    layer.tokens += torch.tensor([10**i for i in order])
    merged = batches.merged(SaliencyStats({"layer": layer}, names, {"model": 1}))
    assert merged.groups == ["b", "a"]
    assert merged.layers["layer"].tokens.tolist() == [11, 1100]
    assert [p.layers["layer"].tokens.tolist() for p in merged.parts] == [[1, 100], [10, 1000]]
    assert all(part.provenance == {"model": 1} for part in merged.parts)
