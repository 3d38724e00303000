"""Runs the models of a comparison on text, in memory or streamed, as memory decides."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.data.batches import PackedBatches
from reap_driver.data.packing import PackedSource
from reap_driver.evaluation.compensation import PlannedModel, RefittedModel, refitted_layers
from reap_driver.evaluation.models import InMemory, compare_resident, compare_streamed
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.evaluation.routing import Orphans, orphans_of_each
from reap_driver.evaluation.sequences import Sums
from reap_driver.load.streamed_model import StreamedModel, open_streamed
from reap_driver.memory.decision import Decision, decide
from reap_driver.memory.machine import this_machine
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.observation.state_store import StateStore
from reap_driver.planning.plan import Plan
from reap_driver.workflow.calibration import batches_of
from reap_driver.workflow.holding import in_memory, load_options, sized
from reap_driver.workflow.inspection import Model, device_of
from reap_driver.workflow.listener import Listener, Step
from reap_driver.workflow.options import RunOptions
from reap_driver.writer.plan_matrices import shapes_of
from reap_kernels import check_backend
from reap_kernels.errors import ResourceError


@dataclass(frozen=True)
class Candidate:
    """A pruned model.

    Attributes:
        name: as it was given.
        pruned: the model; None where a plan is put into the original.
        plan: what was pruned, where that is known.
        matrices: down projections that take the place of the model's: of a plan that is put into
            the original and changes experts that it keeps, or of the pruned model.
    """

    name: str
    pruned: Model | None
    plan: Plan | None
    matrices: Mapping[str, Tensor] | None = None

    @property
    def numbers(self) -> int:
        """Numbers that its matrices and what they replace add to the model in memory."""
        total = 0
        for name, (experts, hidden, narrow) in shapes_of(self.matrices or {}).items():
            layer = None if self.plan is None else self.plan.layers.get(name)
            width = narrow if layer is None or layer.width is None else layer.width
            total += experts * hidden * (narrow + width)
        return total

    def ready(self, masks: RouterMasks) -> PlannedModel:
        """The plan, to be put into the original."""
        assert self.plan is not None
        return PlannedModel(masks, self.plan, self.matrices)


@dataclass(frozen=True)
class Subjects:
    """What is compared: the original, and the candidates, each with it."""

    original: Model
    candidates: list[Candidate]

    @property
    def models(self) -> list[Model]:
        """Those that are loaded, each once."""
        loaded = [one.pruned for one in self.candidates if one.pruned is not None]
        return list({id(model): model for model in (self.original, *loaded)}.values())


@dataclass(frozen=True)
class Text:
    """What the models read.

    Attributes:
        sources: packed, of at least one sequence in all.
        folds: shares of each source that no batch crosses.
        used: whether a batch, by number, is read; all are by default.
    """

    sources: Sequence[PackedSource]
    folds: int = 1
    used: Callable[[PackedBatches, int], bool] = lambda batches, number: True


def compared(
    given: Subjects, run: RunOptions, text: Text, heard: Listener
) -> tuple[list[Sums], list[dict[str, Orphans]]]:
    """Runs the models; counts orphans where plans are known and the original is in memory.

    Returns:
        Sums, and orphans by layer, of each candidate; without orphans where they are not known.

    Raises:
        ResourceError: they do not fit; or a plan, and the original would have to be streamed.
        DataError: logits are not finite.
    """
    check_backend("compare", device_of(run), given.original.meta.dtype, run.backend)
    decision = None if run.device_map is not None else _decided(given, run, text.sources)
    size = (run.batch_size or 1) if decision is None else decision.batch_size
    sizes = [min(size, source.full_sequences) for source in text.sources]
    # All models get the same inputs, so only what all can take.
    layers = [layer for model in given.models for layer in model.layers]
    batches = batches_of(given.original.config, layers, text.sources, sizes, text.folds)
    numbers = [number for number in range(len(batches)) if text.used(batches, number)]
    reading = _Reading(batches, numbers)
    if decision is not None and decision.stream:
        for reason in decision.reasons:
            heard.note(f"streaming all models: {reason}")
        if any(one.plan is not None for one in given.candidates):
            heard.note("orphans are not counted of streamed models")
        with heard.progress("comparing", "tok", reading.tokens) as progress:
            sums = _streamed(given, run, decision, reading, reading.counting(progress))
        return sums, [{} for _ in sums]
    return _resident(given, run, reading, heard)


@dataclass(frozen=True)
class _Reading:
    """The batches that are read."""

    batches: PackedBatches
    numbers: Sequence[int]

    @property
    def tokens(self) -> int:
        """Tokens of these batches."""
        return sum(self.batches.tokens(number) for number in self.numbers)

    def counting(self, progress: Step) -> Callable[[float], None]:
        """Adds shares of the work to a step that counts tokens."""
        total = self.tokens
        return lambda share: progress.add(share * total)


def _resident(
    given: Subjects, run: RunOptions, reading: _Reading, heard: Listener
) -> tuple[list[Sums], list[dict[str, Orphans]]]:
    """Runs the models in memory, and follows the original's routing where plans are known."""
    with contextlib.ExitStack() as stack:
        held = {id(m): stack.enter_context(loaded(run, m, heard)) for m in given.models}
        original = held[id(given.original)]
        planned = any(one.pruned is None for one in given.candidates)
        masks = RouterMasks(original) if planned else None
        pruned = [_ready(one, held, masks) for one in given.candidates]
        with heard.progress("comparing", "tok", reading.tokens) as progress:
            sums = compare_resident(
                original,
                pruned,
                reading.batches,
                reading.numbers,
                backend=run.backend,
                done=reading.counting(progress),
            )
        plans = [one.plan for one in given.candidates if one.plan is not None]
        found = iter(_orphans(original, reading, plans, heard) if plans else [])
        return sums, [{} if one.plan is None else next(found) for one in given.candidates]


def _ready(
    one: Candidate, held: Mapping[int, PreTrainedModel], masks: RouterMasks | None
) -> PreTrainedModel | InMemory:
    """A candidate, ready to run."""
    if one.pruned is None:
        assert masks is not None
        return one.ready(masks)
    model = held[id(one.pruned)]
    return model if one.matrices is None else RefittedModel(model, one.matrices)


def _decided(given: Subjects, run: RunOptions, sources: Sequence[PackedSource]) -> Decision:
    """Decides how all models are held.

    Raises:
        ResourceError: see `decide`; or a plan, and the original does not fit in memory.
    """
    device = device_of(run)
    each = [sized(run, model, sources, device, all_logits=True) for model in given.models]
    sizes, (work, *_) = zip(*each, strict=True)
    machine = this_machine(device, Path(tempfile.gettempdir()))
    whole = together(sizes)
    itemsize = given.original.meta.dtype.itemsize
    more = itemsize * sum(one.numbers for one in given.candidates)
    again = 1 + len(given.candidates) - len(sizes)  # streamed a second time
    whole = replace(
        whole,
        rest_bytes=whole.rest_bytes + more,
        state_bytes=whole.state_bytes + again * sizes[-1].state_bytes,
    )
    decision = decide(run.stream, whole, machine, work)
    if decision.stream and any(one.pruned is None for one in given.candidates):
        path = given.original.path
        raise ResourceError(
            f"{path} would be streamed ({'; '.join(decision.reasons)}), and routers are masked in "
            f"memory only; write the checkpoint with `reap-kernels apply {path} PLAN --out DIR` "
            "and compare with that"
        )
    return decision


def together(sizes: Sequence[ModelSizes]) -> ModelSizes:
    """Sizes of several models together."""
    return replace(
        sizes[0],
        layer_bytes=tuple(nbytes for each in sizes for nbytes in each.layer_bytes),
        rest_bytes=sum(each.rest_bytes for each in sizes),
        state_bytes=sum(each.state_bytes for each in sizes),
    )


@contextlib.contextmanager
def loaded(run: RunOptions, model: Model, heard: Listener) -> Iterator[PreTrainedModel]:
    """One model in memory; what a device map puts on the disk goes to the temporary folder."""
    beside = Path(tempfile.gettempdir(), "reap-compare")
    with in_memory(model.path, run, beside, heard) as held:
        model.check_unchanged()
        yield held


def _streamed(
    given: Subjects,
    run: RunOptions,
    decision: Decision,
    reading: _Reading,
    done: Callable[[float], Any],
) -> list[Sums]:
    """All models, one decoder layer at a time."""
    place = decision.offload or "device"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reap-states-")))
        models: list[StreamedModel] = []
        stores: list[StateStore] = []
        checkpoints = [(one.pruned, one.matrices) for one in given.candidates]
        for number, (model, matrices) in enumerate([(given.original, None), *checkpoints]):
            assert model is not None
            device, how = device_of(run), load_options(run)
            models.append(stack.enter_context(open_streamed(model.path, device=device, **how)))
            model.check_unchanged()
            if matrices is not None:
                models[-1].loaded = refitted_layers(models[-1], matrices)
            stores.append(StateStore(place, device, folder / str(number)))
            stack.callback(stores[-1].close)
        return compare_streamed(
            models, stores, reading.batches, reading.numbers, backend=run.backend, done=done
        )


def _orphans(
    model: PreTrainedModel, reading: _Reading, plans: Sequence[Plan], heard: Listener
) -> list[dict[str, Orphans]]:
    """Runs the original once more, and follows its routing under every plan."""
    with heard.progress("following the routing", "tok", reading.tokens) as progress:

        def each() -> Iterator[dict[str, Any]]:
            for number in reading.numbers:
                yield reading.batches.inputs(number)
                progress.add(reading.batches.tokens(number))

        return orphans_of_each(model, each(), plans)
