"""A checkpoint observed resident and streamed, on the same batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.interrupts import Stop
from reap_driver.load.resident import load_model
from reap_driver.load.streamed_model import StreamedModel, open_streamed
from reap_driver.memory.decision import Offload
from reap_driver.observation.journal import Journal
from reap_driver.observation.observer import observe
from reap_driver.observation.run import ObserverJournal, Run, run_resident, run_streamed
from reap_driver.observation.state_store import StateStore
from reap_kernels import SaliencyStats

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Listed:
    """Batches in memory; the groups alternate."""

    ids: Sequence[Tensor]
    groups: tuple[str, ...] = ("code", "text")

    def group(self, number: int) -> str:
        return self.groups[number % len(self.groups)]

    def inputs(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[number]}


def batches(vocab: int, count: int = 3, seq: int = 16, batch: int = 2) -> Listed:
    """Random token ids, free of special tokens; the last batch is shorter."""
    rng = torch.Generator().manual_seed(7)
    shapes = [(batch, seq)] * (count - 1) + [(1, seq // 2)]
    return Listed([torch.randint(3, vocab, shape, generator=rng) for shape in shapes])


def resident(
    folder: Path, data: Listed, journal: Journal | None = None, model: PreTrainedModel | None = None
) -> SaliencyStats:
    """Statistics of the whole model in memory; `model` is it if it is loaded."""
    observer = observe(load_model(folder) if model is None else model)
    if journal is not None and journal.position:
        raise AssertionError("resume with `go_on`")
    kept = None if journal is None else ObserverJournal(journal, observer)
    run_resident(Run(observer, data, range(len(data.ids)), Stop(), kept))
    return observer.stats


def streamed(
    folder: Path,
    data: Listed,
    place: Offload = "device",
    files: Path | None = None,
    device: torch.device = CPU,
) -> tuple[SaliencyStats, StreamedModel]:
    """Statistics of the streamed model, and the model."""
    store = StateStore(place, device, files)
    with open_streamed(folder, device=device) as opened:
        observer = observe(opened.model)
        run_streamed(Run(observer, data, range(len(data.ids)), Stop()), opened, store)
        store.close()
        return observer.stats, opened


def assert_same_bits(mine: SaliencyStats, theirs: SaliencyStats) -> None:
    """Every field of every layer and fold is equal, and the provenance except for the time."""
    assert list(mine.layers) == list(theirs.layers)
    assert mine.groups == theirs.groups
    for name, layer in mine.layers.items():
        for field, value in layer.fields().items():
            assert torch.equal(value, theirs.layers[name].fields()[field]), (name, field)
    timed = ("created", "observed")
    left, right = ({**s.provenance, **dict.fromkeys(timed)} for s in (mine, theirs))
    assert left == right
    for part, other in zip(mine.parts, theirs.parts, strict=True):
        assert_same_bits(part, other)
