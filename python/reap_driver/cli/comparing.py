"""How `compare` runs: two models, or one with masked routers, held as fits, on the same batches."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.cli import calibrate, running
from reap_driver.cli.calibrate import Model
from reap_driver.cli.console import Console
from reap_driver.data.batches import PackedBatches
from reap_driver.data.packing import PackedSource
from reap_driver.data.source import DataSource
from reap_driver.evaluation import tasks
from reap_driver.evaluation.models import compare_resident, compare_streamed
from reap_driver.evaluation.routing import Orphans, orphans
from reap_driver.evaluation.sequences import Comparison, Sums
from reap_driver.evaluation.vocabularies import check_vocabularies
from reap_driver.load.streamed_model import open_streamed
from reap_driver.memory.decision import Decision, decide
from reap_driver.memory.machine import this_machine
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.observation.state_store import StateStore
from reap_driver.plan.plan import Plan
from reap_driver.writer.plan_checks import check_model, check_same_layers
from reap_kernels import check_backend
from reap_kernels.errors import ResourceError
from reap_kernels.files import is_file


@dataclass(frozen=True)
class Pair:
    """What is compared.

    Attributes:
        original: the original.
        pruned: the pruned model; None where a plan masks the original's routers.
        plan: what was pruned, where that is known.
    """

    original: Model
    pruned: Model | None
    plan: Plan | None

    @property
    def models(self) -> list[Model]:
        """Those that are loaded."""
        return [self.original] if self.pruned is None else [self.original, self.pruned]


@dataclass(frozen=True)
class Compared:
    """What a run found; `orphans` where the plan is known and the original was in memory."""

    comparison: Comparison
    orphans: dict[str, Orphans] | None


def pair_of(args: argparse.Namespace, console: Console) -> Pair:
    """Both models, checked without reading weights; PRUNED is a plan where it is a file.

    Raises:
        CheckpointError, UnsupportedModel: one of the models cannot be loaded.
        PlanError: the plan is of another model.
        DataError: the vocabularies differ.
    """
    original = calibrate.inspect_model(args)
    original.check_files()
    if is_file(args.pruned):
        return Pair(original, None, _plan(args, Path(args.pruned), original, console))
    pruned = calibrate.inspect_model(args, args.pruned)
    pruned.check_files()
    folders = [(model.source.folder, model.config) for model in (original, pruned)]
    check_vocabularies(*folders, trust_remote_code=args.trust_remote_code)
    record = pruned.source.folder / "reap" / "plan.json"
    known = _plan(args, record, original, console) if record.is_file() else None
    return Pair(original, pruned, known)


def _plan(args: argparse.Namespace, path: Path, original: Model, console: Console) -> Plan:
    """A plan that is the original's, or holds for it."""
    plan = Plan.load(path)
    check_same_layers(plan, original.layers)
    notes = check_model(plan, original.provenance, args.model, force=args.force_model)
    for note in notes:
        console.note(note)
    return plan


def read_data(args: argparse.Namespace, pair: Pair, console: Console) -> list[PackedSource]:
    """Tokens of all sources, by the original's tokenizer, in sequences both models can read."""
    seq_len = min(calibrate.check_options(args, model.config) for model in pair.models)
    for model in pair.models:
        calibrate.check_packing(args, model.meta.config, model.layers)
    wanted = [_limited(source, args, seq_len) for source in calibrate.sources_of(args)]
    return calibrate.read_data(args, wanted, pair.original.config, seq_len, console)


def _limited(source: DataSource, args: argparse.Namespace, seq_len: int) -> DataSource:
    """A source with what --sequences or --tokens allows, unless it has a budget of its own."""
    if source.samples is not None or source.tokens is not None:
        return source
    if args.sequences is not None and args.packing == "none":
        return replace(source, samples=args.sequences)
    tokens = args.tokens if args.sequences is None else args.sequences * seq_len
    return replace(source, tokens=tokens)


def compared(
    args: argparse.Namespace, pair: Pair, sources: Sequence[PackedSource], console: Console
) -> Compared:
    """Runs the models.

    Raises:
        ResourceError: they do not fit; or a plan, and the original would have to be streamed.
        DataError: nothing counts, or logits are not finite.
    """
    device = calibrate.device_of(args)
    backend = args.backend
    check_backend("compare", device, pair.original.meta.dtype, backend)
    decision = None if args.device_map is not None else _decided(args, pair, sources)
    size = (args.batch_size or 1) if decision is None else decision.batch_size
    sizes = [min(size, source.full_sequences) for source in sources]
    batches = calibrate.batches_of(pair.original.config, _layers(pair), sources, sizes)
    total = sum(source.tokens for source in sources)
    if decision is not None and decision.stream:
        for reason in decision.reasons:
            console.note(f"streaming both models: {reason}")
        if pair.plan is not None:
            console.note("orphans are not counted of streamed models")
        with console.progress("comparing", "tok", total) as progress:
            sums = _streamed(args, pair, decision, batches, lambda s: progress.add(s * total))
        return Compared(sums.comparison(args.draws, args.seed), None)
    with contextlib.ExitStack() as stack:
        loaded = [stack.enter_context(_loaded(args, model, console)) for model in pair.models]
        pruned = pair.plan if pair.pruned is None else loaded[1]
        assert pruned is not None
        with console.progress("comparing", "tok", total) as progress:
            sums = compare_resident(
                loaded[0],
                pruned,
                batches,
                range(len(batches)),
                backend=backend,
                done=lambda share: progress.add(share * total),
            )
        lost = (
            None if pair.plan is None else _orphans(loaded[0], batches, pair.plan, total, console)
        )
    return Compared(sums.comparison(args.draws, args.seed), lost)


def _layers(pair: Pair) -> Any:
    """MoE layers of both: what either cannot be given is not given to any."""
    return [layer for model in pair.models for layer in model.layers]


def _decided(args: argparse.Namespace, pair: Pair, sources: Sequence[PackedSource]) -> Decision:
    """How the models are best held, both alike.

    Raises:
        ResourceError: see `decide`; or a plan, and the original does not fit in memory.
    """
    device = calibrate.device_of(args)
    sized = [running.sized(args, each, sources, device, all_logits=True) for each in pair.models]
    sizes, (work, *_) = zip(*sized, strict=True)
    machine = this_machine(device, Path(tempfile.gettempdir()))
    decision = decide(args.stream, _together(sizes), machine, work)
    if decision.stream and pair.pruned is None:
        raise ResourceError(
            f"{args.model} would be streamed ({'; '.join(decision.reasons)}), and routers are "
            f"masked in memory only; write the checkpoint with `reap-kernels apply {args.model} "
            f"{args.pruned} --out DIR` and compare with that"
        )
    return decision


def _together(sizes: Sequence[ModelSizes]) -> ModelSizes:
    """Models of which all are in memory, or the states of all and the layers of one at a time."""
    return replace(
        sizes[0],
        layer_bytes=tuple(nbytes for each in sizes for nbytes in each.layer_bytes),
        rest_bytes=sum(each.rest_bytes for each in sizes),
        state_bytes=sum(each.state_bytes for each in sizes),
    )


@contextlib.contextmanager
def _loaded(args: argparse.Namespace, model: Model, console: Console) -> Iterator[PreTrainedModel]:
    """One model in memory; what a device map puts on the disk goes to the temporary folder."""
    beside = Path(tempfile.gettempdir(), "reap-compare")
    with running.in_memory(args, model.path, beside, console) as loaded:
        model.check_unchanged()
        yield loaded


def _streamed(
    args: argparse.Namespace, pair: Pair, decision: Decision, batches: PackedBatches, done: Any
) -> Sums:
    """Both models, one decoder layer at a time."""
    options, place = running.load_options(args), decision.offload or "device"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reap-states-")))
        models, stores = [], []
        for number, model in enumerate(pair.models):
            device = calibrate.device_of(args)
            models.append(stack.enter_context(open_streamed(model.path, device=device, **options)))
            model.check_unchanged()
            stores.append(StateStore(place, device, folder / str(number)))
            stack.callback(stores[-1].close)
        return compare_streamed(
            models, stores, batches, range(len(batches)), backend=args.backend, done=done
        )


def _orphans(
    model: PreTrainedModel, batches: PackedBatches, plan: Plan, total: int, console: Console
) -> dict[str, Orphans]:
    """Runs the original once more, and follows its routing."""
    with console.progress("following the routing", "tok", total) as progress:

        def each() -> Iterator[dict[str, Any]]:
            for number in range(len(batches)):
                yield batches.inputs(number)
                progress.add(total / len(batches))

        return orphans(model, each(), plan)


def evaluated(
    args: argparse.Namespace, pair: Pair, console: Console
) -> tuple[tasks.Results, tasks.Results]:
    """Tasks by the original and by the pruned model, one in memory at a time."""
    options = {
        "folder": args.task_folder,
        "limit": args.limit,
        "chat_template": args.chat_template,
        "batch_size": args.batch_size or 1,
        "trust_remote_code": args.trust_remote_code,
    }

    def answers(model: PreTrainedModel, plan: Plan | None = None) -> tasks.Results:
        kept = None if plan is None else plan.kept
        return tasks.evaluate(model, args.model, args.tasks, kept=kept, **options)

    with _loaded(args, pair.original, console) as original:
        first = answers(original)
        if pair.pruned is None:
            return first, answers(original, pair.plan)
    with _loaded(args, pair.pruned, console) as pruned:
        return first, answers(pruned)
