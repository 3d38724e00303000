"""Runs a model over batches, resident or streamed by decoder layer.

Both ways run the same batches through the same observer and write the same kind of journal. Their
statistics are identical, bit for bit.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.interrupts import Interrupted, Stop
from reap_driver.data.prefetch import prefetched, ready_for
from reap_driver.load.streamed_model import StreamedModel
from reap_driver.observation.journal import Journal
from reap_driver.observation.layer_runner import LayerRunner
from reap_driver.observation.observer import DEFAULT_GROUP, Observer
from reap_driver.observation.state_store import StateStore
from reap_kernels.errors import DataError

_POLL = 0.1  # seconds between two checks of a request to end the run


class Batches(Protocol):
    """Batches by number, made on demand; a streamed model requests each one once per layer."""

    def group(self, number: int) -> str:
        """The calibration group of a batch."""
        ...

    def inputs(self, number: int) -> dict[str, Tensor]:
        """Keyword arguments of the observer: `input_ids` [batch, seq] int64 and others."""
        ...


@dataclass(frozen=True)
class BatchList:
    """Batches in memory, and their groups."""

    batches: Sequence[Mapping[str, Tensor]]
    groups: Sequence[str]

    @classmethod
    def checked(
        cls, batches: Sequence[Mapping[str, Tensor]], groups: Sequence[str] | None
    ) -> "BatchList":
        """Batches with one group each; by default all in one.

        Raises:
            DataError: there is no batch, or the number of groups is not that of the batches.
        """
        names = [DEFAULT_GROUP] * len(batches) if groups is None else list(groups)
        if not batches or len(names) != len(batches):
            raise DataError(
                f"{len(batches)} batches and {len(names)} groups: give at least one batch, and one "
                "group for each"
            )
        return cls(batches, names)

    def group(self, number: int) -> str:
        """See `Batches`."""
        return self.groups[number]

    def inputs(self, number: int) -> dict[str, Tensor]:
        """See `Batches`."""
        return dict(self.batches[number])


class ModelContext(Protocol):
    """The interface through which a run calls its model: an `Observer` or a predictor."""

    model: PreTrainedModel

    def __enter__(self) -> Any: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Any: ...

    def group(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context in which batches are counted under this calibration group."""
        ...

    def __call__(self, **inputs: Any) -> Any:
        """Runs the model on a batch, with the arguments of `Batches.inputs`."""
        ...


@dataclass(frozen=True)
class ObserverJournal:
    """A journal, and the observer whose statistics are written to it.

    Attributes:
        journal: it.
        observer: its statistics are written.
        states: writes what else a position of a resident model needs; None for nothing.
    """

    journal: Journal
    observer: Observer
    states: Callable[[Path], None] | None = None

    @property
    def folder(self) -> Path:
        """Folder of the journal."""
        return self.journal.folder

    @property
    def position(self) -> int:
        """Number of layers or batches in the journal."""
        return self.journal.position

    def due(self, position: int) -> bool:
        """See `Journal.due`."""
        return self.journal.due(position)

    def write(
        self, position: int, seconds: float, states: Callable[[Path], None] | None = None
    ) -> None:
        """Writes an entry with the statistics so far; see `Journal.write`."""
        states = states or self.states
        self.journal.write(position, self.observer.snapshot(), states, seconds=seconds)


@dataclass
class Run:
    """One pass of a model over batches.

    Attributes:
        observer: calls the model; the run enters its context.
        batches: batches of the whole calibration set, by number.
        numbers: numbers of the batches of this process.
        stop: the request to end the run.
        journal: the journal to write; None for none.
        done: called with the fraction of the work that was just finished.
        layer_done: called with the name of a streamed decoder layer that has run on all batches,
            while it is loaded.
        seconds: duration of the run, the earlier runs that it resumes included.
    """

    observer: ModelContext
    batches: Batches
    numbers: Sequence[int]
    stop: Stop
    journal: ObserverJournal | None = None
    done: Callable[[float], Any] = lambda _: None
    layer_done: Callable[[str], Any] = lambda _: None
    seconds: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    def clock(self) -> float:
        """Updates `seconds` and returns it."""
        now = time.monotonic()
        self.seconds, self._began = self.seconds + now - self._began, now
        return self.seconds

    @property
    def start(self) -> int:
        """Number of layers or batches that the journal already contains."""
        return 0 if self.journal is None else self.journal.position

    def feed(self, number: int, inputs: Mapping[str, Tensor]) -> Any:
        """Runs the model on a batch, counted under the batch's group."""
        with self.observer.group(self.batches.group(number)):
            return self.observer(**inputs)

    def interrupt(self, what: str) -> Interrupted:
        """The exception that ends the run; its text says how to resume."""
        if self.journal is None or not self.journal.position:  # nothing to resume
            return self.stop.interrupted(f"interrupted {what}")
        return self.stop.interrupted(
            f"interrupted {what}; the journal is in {self.journal.folder}: run the same command "
            "with `resume=True` to continue from there"
        )


def run_resident(run: Run) -> None:
    """Runs a resident model, batch by batch.

    Raises:
        Interrupted: the run was asked to end; the journal is written. Raised between two batches.
    """
    total = len(run.numbers)
    left = run.numbers[run.start :]
    batches = prefetched(map(run.batches.inputs, left), run.observer.model.device)
    with run.observer, contextlib.closing(batches):
        for position, (number, batch) in enumerate(zip(left, batches, strict=True), run.start + 1):
            run.feed(number, batch)
            run.done(1 / total)
            journal = run.journal
            if journal is not None and (run.stop.requested or journal.due(position)):
                journal.write(position, run.clock())
            if run.stop.requested and position < total:
                raise run.interrupt(f"after {position} of {total} batches")


def run_streamed(run: Run, streamed: StreamedModel, store: StateStore) -> None:
    """Runs a model layer by layer, each layer on all batches.

    Raises:
        Interrupted: the run was asked to end; the journal is written. Raised as soon as the journal
            contains every finished layer, else after the current layer.
    """
    layers = streamed.text_layers
    runner, total = LayerRunner(layers), len(layers)
    if not run.numbers:  # more processes than batches
        return
    with run.observer, runner.bound():
        for layer in range(run.start, total):
            store.begin(layer + 1)
            _await(run, streamed, layer, total)
            if layer + 1 < total:
                streamed.prefetch(layer + 1)
            for number, following in followed(run.numbers):
                _run_batch(run, runner, store, layer, number, following)
                run.done(1 / total / len(run.numbers))
                _leave_if_current(run, layer, total)
            run.layer_done(layers[layer][0])
            streamed.release(layer)
            _write(run, store, layer + 1, total)
            store.turn()
        _check_end(run, runner, store, total)


def _run_batch(
    run: Run, runner: LayerRunner, store: StateStore, layer: int, number: int, following: int | None
) -> None:
    """Runs one layer on one batch; if the model skips the layer, the state stays the same."""
    state = store.get(number, following)
    inputs = ready_for(run.batches.inputs(number), store.device)
    new = runner.run(layer, lambda: run.feed(number, inputs), state)
    store.put(number, state if new is None else new)


def _await(run: Run, streamed: StreamedModel, layer: int, total: int) -> None:
    """Waits for a layer's weights; a request to end the run is served meanwhile."""
    while not streamed.ready(layer, _POLL):
        _leave_if_current(run, layer, total)


def _leave_if_current(run: Run, layer: int, total: int) -> None:
    """Ends the run if that was requested and the journal contains every finished layer."""
    if run.stop.requested and (run.journal is None or run.journal.position == layer):
        raise run.interrupt(f"after {layer} of {total} layers")


def _write(run: Run, store: StateStore, position: int, total: int) -> None:
    """Writes the journal after a layer if it is due; always if the states are in files."""
    journal = run.journal
    if journal is None:
        return
    if run.stop.requested or store.in_files or journal.due(position):
        journal.write(position, run.clock(), store.save)
        if run.stop.requested and position < total:
            raise run.interrupt(f"after {position} of {total} layers")


def _check_end(run: Run, runner: LayerRunner, store: StateStore, total: int) -> None:
    """Runs what follows the last layer on one batch, to check that no layer is called there.

    Raises:
        UnsupportedModel: the model calls a layer again, or called none of its experts.
    """
    number = run.numbers[0]
    state = None if store.empty else store.get(number, None)
    if state is None:  # checked by the run that wrote the journal, or the batch reaches no layer
        return
    inputs = ready_for(run.batches.inputs(number), store.device)
    runner.run(total, lambda: run.feed(number, inputs), state)


def followed(numbers: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """Each number with the one that follows it."""
    return zip(numbers, [*numbers[1:], None], strict=True)
