"""Re-fits a pruned model to its original, layer by layer, with the hidden states of both.

The pruned model's layers before the one at hand are re-fitted already, so its experts are solved
for the inputs that they will get, and for all that the residual stream lacks so far.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from reap_driver.base.interrupts import Interrupted, Stop
from reap_driver.compensation.refit import STEPS, LayerRefit, solve
from reap_driver.data.prefetch import ready_for
from reap_driver.memory.decision import Offload
from reap_driver.observation.data_parallel import Ranks
from reap_driver.observation.observer import observe
from reap_driver.observation.run import Batches, followed
from reap_driver.observation.state_store import StateStore, states_folder
from reap_driver.refitting.capture import CapturingObserver
from reap_driver.refitting.kept_experts import KeptExperts
from reap_driver.refitting.layer_pass import LayerPass
from reap_driver.refitting.row_store import RowStore
from reap_driver.refitting.streams import LayeredModel, Stream
from reap_kernels.errors import DataError

STREAMS = ("original", "pruned")  # folders of their states
_POLL = 0.1  # seconds between two checks of a request to end the run
_RUNNING = 0.4  # share of a layer's work for running both models


@dataclass(frozen=True)
class LayerFacts:
    """How the re-fit of one layer went.

    Attributes:
        experts: ids, in the original, of the pruned layer's experts.
        ridge, error_before, error_after, kept: see `LayerRefit`; errors are of the residual stream
            after the layer.
        fitted, held_out: tokens that were fitted, and that chose the ridge and judged the fit.
        scale: by which the layer multiplies the sum of its experts' outputs.

    Example:
        >>> rd.LayerFacts((0, 2), 0.03, 2.0, 1.5, True, 7000, 1000, 1.0).gain
        0.25
    """

    experts: tuple[int, ...]
    ridge: float
    error_before: float
    error_after: float
    kept: bool
    fitted: int
    held_out: int
    scale: float

    @property
    def gain(self) -> float:
        """Share of the error that the re-fit takes away; 0 where it is not kept."""
        return 1 - self.error_after / self.error_before if self.kept else 0.0


class Journal(Protocol):
    """What a run that was ended goes on from.

    Attributes:
        position: decoder layers that are done.
        layers: facts of the layers that are done.
    """

    position: int
    layers: Mapping[str, LayerFacts]

    def due(self) -> bool:
        """Whether a position should be written, the same on every rank."""
        ...

    def write(self, position: int, layers: Mapping[str, LayerFacts]) -> None:
        """Replaces the position, once all ranks have saved their states."""
        ...


@dataclass(frozen=True)
class Refit:
    """What to re-fit a pruned model with, and how.

    Attributes:
        batches: batches of the whole data, by number.
        numbers: those of this process.
        held_out: of every batch of the data, by number, whether it is held out to choose the ridge
            and to judge.
        put: receives each layer whose re-fit is kept: its name and new down projections [E, H, I]
            in the model's dtype, on its device; on every rank the same.
        ridge, steps, backend: see `refit_layer`.
        offload: where states and rows are stored between two uses.
        folder: for files, of this rank; with a journal it stays.
        journal: None for a run that always begins anew.
        world: the ranks that share the batches.
        stop: the request to end the run.
        done: called with the fraction of the work that was just finished.
    """

    batches: Batches
    numbers: Sequence[int]
    held_out: Sequence[bool]
    put: Callable[[str, Tensor], Any]
    ridge: float | None = None
    steps: int = STEPS
    backend: str | None = None
    offload: Offload = "device"
    folder: Path | None = None
    journal: Journal | None = None
    world: Ranks = field(default_factory=Ranks)
    stop: Stop = field(default_factory=Stop)
    done: Callable[[float], Any] = lambda _: None


def refit_layers(
    refit: Refit, original: LayeredModel, pruned: LayeredModel
) -> dict[str, LayerFacts]:
    """Re-fits a pruned model, in which nothing changes.

    Memory: two layers of the pruned model and one of the original. Where states are stored, for T
    tokens of width H: of both streams 2 T H numbers in the model's dtype and, while a layer is
    solved, 4 T H more and T H in float32. On the device, besides, what `refit_layer` needs.

    Returns:
        {experts module: facts} of the layers that tokens reached, in the model's order.

    Raises:
        CheckpointError: the one is no cut of the other, or cannot be read.
        UnsupportedModel: a layer does more than to add a multiple of its experts' output to one
            residual stream; or see `observe`.
        DataError: no batch is held out and no ridge given; or values are not finite.
        Interrupted: the run was asked to end.
    """
    with contextlib.ExitStack() as stack:
        streams = []
        for layers, observer, name in (
            (original, observe(original.model, backend=refit.backend, fuse=False), STREAMS[0]),
            (pruned, CapturingObserver(pruned.model, refit.backend), STREAMS[1]),
        ):
            folder = None if refit.folder is None else refit.folder / name
            store = StateStore(refit.offload, layers.device, folder)
            stack.callback(store.close)
            streams.append(Stream.of(layers, observer, store))
        engine = _Engine(refit, *streams)
        for stream in streams:
            stack.enter_context(stream.bound())
        return engine.run()


class _Engine:
    """One run over all layers of the original (`full`) and the pruned model (`cut`)."""

    def __init__(self, refit: Refit, full: Stream, cut: Stream) -> None:
        self._refit, self._full, self._cut = refit, full, cut
        self._streams = full, cut
        self._kept = KeptExperts(full.layers.model, cut.layers.model)
        names, others = ([name for name, _ in one.layers.text_layers] for one in (cut, full))
        if names != others:
            raise self._kept.refusal(f"it has {len(names)} decoder layers, there are {len(others)}")
        self._names = names

    def run(self) -> dict[str, LayerFacts]:
        """Re-fits all layers."""
        facts, start = self._resumed()
        self._refit.done(start / len(self._names))
        for layer in range(start, len(self._names)):
            facts |= self._layer(layer)
            asked = self._asked()
            self._write(layer + 1, facts, asked=asked)
            for stream in self._streams:
                stream.store.turn()
            if asked and layer + 1 < len(self._names):
                raise self._interrupted(layer + 1)
        self._check_end()
        return facts

    def _resumed(self) -> tuple[dict[str, LayerFacts], int]:
        """The facts of the layers that are done, and how many decoder layers are; their states are
        loaded.
        """
        journal = self._refit.journal
        if journal is None or not journal.position:
            return {}, 0
        for stream, folder in zip(self._streams, self._folders(journal.position), strict=True):
            stream.store.load(folder)
        return dict(journal.layers), journal.position

    def _write(self, position: int, facts: Mapping[str, LayerFacts], *, asked: bool) -> None:
        """Writes the journal after a layer if it is due; always if the states are in files."""
        journal = self._refit.journal
        if journal is None:
            return
        if asked or self._cut.store.in_files or journal.due():
            for stream, folder in zip(self._streams, self._folders(position), strict=True):
                folder.parent.mkdir(parents=True, exist_ok=True)
                stream.store.save(folder)
            journal.write(position, facts)

    def _folders(self, position: int) -> list[Path]:
        """Where the states of both models after a number of layers are saved."""
        folder = self._refit.folder
        assert folder is not None  # with a journal
        return [states_folder(folder / name, position) for name in STREAMS]

    def _layer(self, layer: int) -> dict[str, LayerFacts]:
        """Runs one layer of both models on all batches, and re-fits its experts."""
        refit, name = self._refit, self._names[layer]
        for stream in self._streams:
            while not stream.layers.ready(layer, _POLL):
                self._leave_if_alone(layer)
        for stream in self._streams:
            stream.store.begin(layer + 1)
        experts = [moe for moe in self._cut.observer.layers if moe.name.startswith(f"{name}.")]
        kept = {moe.name: self._kept.of(moe.name) for moe in experts}
        held = [refit.held_out[number] for number in refit.numbers]
        folder = None if refit.folder is None else refit.folder / "rows"
        rows = RowStore(refit.offload, self._cut.store.device, folder, held)
        with contextlib.closing(rows):
            both = LayerPass(layer, name, self._full, self._cut, experts, held, rows)
            for place, (number, following) in enumerate(followed(refit.numbers)):
                inputs = ready_for(refit.batches.inputs(number), self._cut.store.device)
                both.run(place, inputs, number, following)
                refit.done(_RUNNING / len(self._names) / len(refit.numbers))
                self._leave_if_alone(layer)
            for stream in self._streams:
                stream.observer.check_finite(f"{name}.")
            self._full.layers.release(layer)
            if layer + 1 < len(self._names):  # not earlier, so that three layers are in memory
                for stream in self._streams:
                    stream.layers.prefetch(layer + 1)
            facts = self._solved(both, kept)
        self._cut.layers.release(layer)
        refit.done((1 - _RUNNING if refit.numbers else 1) / len(self._names))
        return facts

    def _solved(self, both: LayerPass, kept: dict[str, tuple[int, ...]]) -> dict[str, LayerFacts]:
        """The facts of a layer that has run on all batches; it is re-fitted."""
        refit = self._refit
        name, response, (fitted, held_out) = both.agreed(refit.world)
        if name is None:
            return {}
        scale = both.factor(response)
        both.rows.complete()
        found = self._solution(both, name, scale)
        if found.kept:
            refit.put(name, found.down)
        both.advance(refit.numbers, kept=found.kept)
        errors = found.error_before, found.error_after
        facts = LayerFacts(kept[name], found.ridge, *errors, found.kept, fitted, held_out, scale)
        return {name: facts}

    def _solution(self, both: LayerPass, name: str, scale: float) -> LayerRefit:
        """The new down projections of an MoE layer."""
        refit, experts = self._refit, both.observer.weights(name)
        try:
            return solve(
                experts,
                both.rows,
                both.sums(name, experts.device),
                ridge=refit.ridge,
                steps=refit.steps,
                scale=scale,
                total=refit.world.total,
                backend=refit.backend,
            )
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def _check_end(self) -> None:
        """Runs what follows the last layer on one batch, to check that no layer is called there."""
        refit = self._refit
        for stream in self._streams:
            if refit.numbers and not stream.store.empty:
                number = refit.numbers[0]
                inputs = ready_for(refit.batches.inputs(number), stream.store.device)
                stream.run(len(self._names), inputs, stream.store.get(number, None))

    def _leave_if_alone(self, layer: int) -> None:
        """Ends the run inside a layer if that was requested and the journal has every layer that is
        done; other ranks would wait for this one.
        """
        refit = self._refit
        known = refit.journal is None or refit.journal.position == layer
        if known and refit.world.size == 1 and refit.stop.requested:
            raise self._interrupted(layer)

    def _asked(self) -> bool:
        """Whether the end of the run was requested of any rank."""
        asked = torch.tensor([float(self._refit.stop.requested)])
        self._refit.world.total([asked])
        return bool(asked)

    def _interrupted(self, layer: int) -> Interrupted:
        return self._refit.stop.interrupted(
            f"interrupted after {layer} of {len(self._names)} layers"
        )
