"""Runs a model over calibration batches while it is observed, resident or streamed.

Both ways observe the same batches in the same composition through the same observer, write the
same journal, and end with the same statistics, bit for bit.
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

_LISTEN = 0.1  # seconds between two looks at whether somebody has asked the run to end


class Batches(Protocol):
    """Batches by their number, made when asked for: a streamed model asks once a layer."""

    def group(self, number: int) -> str:
        """The calibration group a batch is counted under."""
        ...

    def inputs(self, number: int) -> dict[str, Tensor]:
        """The observer's arguments: `input_ids` [batch, seq] int64 and what goes with them."""
        ...


@dataclass(frozen=True)
class Given:
    """Batches and their groups as they were given from Python."""

    batches: Sequence[Mapping[str, Tensor]]
    groups: Sequence[str]

    @classmethod
    def checked(
        cls, batches: Sequence[Mapping[str, Tensor]], groups: Sequence[str] | None
    ) -> "Given":
        """Raises DataError unless there is a batch, and a group for each; None: one for all."""
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


class Called(Protocol):
    """A model as a run calls it: inside its context, with batches of one calibration group."""

    model: PreTrainedModel

    def __enter__(self) -> Any: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Any: ...

    def group(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Calls inside the context are counted under this calibration group."""
        ...

    def __call__(self, **inputs: Any) -> Any:
        """Runs the model on a batch: `Batches.inputs`."""
        ...


@dataclass(frozen=True)
class ObserverJournal:
    """A journal, and the observer whose statistics are written to it."""

    journal: Journal
    observer: Observer

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.journal.folder

    @property
    def position(self) -> int:
        """Layers or batches that it has."""
        return self.journal.position

    def due(self, position: int) -> bool:
        """See `Journal.due`."""
        return self.journal.due(position)

    def write(
        self, position: int, seconds: float, states: Callable[[Path], None] | None = None
    ) -> None:
        """Writes an entry with the statistics so far; see `Journal.write`."""
        self.journal.write(position, self.observer.snapshot(), states, seconds=seconds)


@dataclass
class Run:
    """One pass of a model over batches.

    Attributes:
        observer: what calls the model; entered by the run.
        batches: what it runs on; the numbers are those of the whole calibration set.
        numbers: which of them are this process's.
        stop: whether it was asked to end.
        journal: what it writes, if anything.
        done: called with the share of the whole work that was just done.
        seconds: it ran, in the runs it goes on from too.
    """

    observer: Called
    batches: Batches
    numbers: Sequence[int]
    stop: Stop
    journal: ObserverJournal | None = None
    done: Callable[[float], Any] = lambda _: None
    seconds: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    def clock(self) -> float:
        """Seconds it ran so far, kept in `seconds`."""
        now = time.monotonic()
        self.seconds, self._began = self.seconds + now - self._began, now
        return self.seconds

    @property
    def start(self) -> int:
        """Layers or batches that the journal has already."""
        return 0 if self.journal is None else self.journal.position

    def feed(self, number: int, inputs: Mapping[str, Tensor]) -> Any:
        """Runs the model on a batch."""
        with self.observer.group(self.batches.group(number)):
            return self.observer(**inputs)

    def interrupt(self, what: str) -> Interrupted:
        """What is raised to end the run, when the journal is written."""
        if self.journal is None or not self.journal.position:  # nothing to resume
            return self.stop.interrupted(f"interrupted {what}")
        return self.stop.interrupted(
            f"interrupted {what}; the journal is in {self.journal.folder}: give the same command "
            "with --resume to go on from there"
        )


def run_resident(run: Run) -> None:
    """Runs a model that is in memory, batch by batch.

    Raises:
        Interrupted: on request, between two batches, with the journal written.
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
        Interrupted: on request, with the journal written: at once where it is current, else when
            the layer in hand is done.
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
            for number, following in _followed(run.numbers):
                _run_batch(run, runner, store, layer, number, following)
                run.done(1 / total / len(run.numbers))
                _leave_if_current(run, layer, total)
            streamed.release(layer)
            _write(run, store, layer + 1, total)
            store.turn()
        _check_end(run, runner, store, total)


def _run_batch(
    run: Run, runner: LayerRunner, store: StateStore, layer: int, number: int, following: int | None
) -> None:
    """One layer on one batch; a layer that a batch does not reach leaves its state alone."""
    state = store.get(number, following)
    inputs = ready_for(run.batches.inputs(number), store.device)
    new = runner.run(layer, lambda: run.feed(number, inputs), state)
    store.put(number, state if new is None else new)


def _await(run: Run, streamed: StreamedModel, layer: int, total: int) -> None:
    """Waits for a layer's weights, and listens."""
    while not streamed.ready(layer, _LISTEN):
        _leave_if_current(run, layer, total)


def _leave_if_current(run: Run, layer: int, total: int) -> None:
    """Ends the run on request where the journal lacks no more than the layer in hand."""
    if run.stop.requested and (run.journal is None or run.journal.position == layer):
        raise run.interrupt(f"after {layer} of {total} layers")


def _write(run: Run, store: StateStore, position: int, total: int) -> None:
    """Writes the journal behind a layer where it is due: always where the states are files."""
    journal = run.journal
    if journal is None:
        return
    if run.stop.requested or store.in_files or journal.due(position):
        journal.write(position, run.clock(), store.save)
        if run.stop.requested and position < total:
            raise run.interrupt(f"after {position} of {total} layers")


def _check_end(run: Run, runner: LayerRunner, store: StateStore, total: int) -> None:
    """Lets one batch run to the end of the model, without its layers: nothing may be left to run.

    Raises:
        UnsupportedModel: the model calls layers again, or none of its experts was called.
    """
    number = run.numbers[0]
    state = None if store.empty else store.get(number, None)
    if state is None:  # the run that wrote the journal got past here; or no layer is for the batch
        return
    inputs = ready_for(run.batches.inputs(number), store.device)
    runner.run(total, lambda: run.feed(number, inputs), state)


def _followed(numbers: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """Every number with the one behind it."""
    return zip(numbers, [*numbers[1:], None], strict=True)
