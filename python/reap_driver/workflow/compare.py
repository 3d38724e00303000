"""Comparing: how closely a pruned model follows its original, on the same batches."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.compat.decoder_layers import decoder_layers
from reap_driver.data.batches import PackedBatches
from reap_driver.data.packing import PackedSource
from reap_driver.data.source import DataSource
from reap_driver.evaluation import tasks
from reap_driver.evaluation.audit import check_permutation
from reap_driver.evaluation.models import compare_resident, compare_streamed
from reap_driver.evaluation.routing import Orphans, orphans, retained
from reap_driver.evaluation.sequences import Comparison, Sums
from reap_driver.evaluation.vocabularies import check_vocabularies
from reap_driver.load.streamed_model import open_streamed
from reap_driver.memory.decision import Decision, decide
from reap_driver.memory.machine import this_machine
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.observation.state_store import StateStore
from reap_driver.planning.plan import Plan
from reap_driver.workflow.calibration import batches_of, read_data, template_of
from reap_driver.workflow.comparison_results import Compared, figures_table, integrity_lines
from reap_driver.workflow.holding import in_memory, load_options, sized
from reap_driver.workflow.inspection import (
    Model,
    check_packing,
    device_of,
    inspect_model,
    sequence_length,
)
from reap_driver.workflow.jobs import CompareOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.plan import Planned, plan_of
from reap_driver.workflow.sources import sources_of
from reap_driver.writer.plan_checks import check_model, check_same_layers
from reap_kernels import SaliencyStats, check_backend
from reap_kernels.errors import DataError, PlanError, ResourceError
from reap_kernels.files import is_file

# Of both checkpoints, spread evenly: enough to find experts that were written in another order.
_CHECKED_LAYERS = 4


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


def compare(options: CompareOptions, listener: Listener | None = None) -> Compared:
    """Compares a pruned model with its original; see `reap_driver.compare`."""
    if options.tasks:
        tasks.check_installed()
    heard = Collector(listener)
    pair = pair_of(options, heard)
    comparison, data, integrity = None, [], {}
    if options.data.given:
        sources = _read_data(options, pair, heard)
        comparison, lost = _compared(options, pair, sources, heard)
        data = [source.provenance() for source in sources]
        heard.say(figures_table(comparison))
        integrity = _integrity(options, pair, lost, heard)
        if integrity:
            heard.say(integrity_lines(integrity))
    answers = None
    if options.tasks:
        answers = _evaluated(options, pair, heard)
        heard.say(tasks.table(*answers))
    named = options.pruned if isinstance(options.pruned, str | Path) else "a plan"
    return Compared(
        heard.notes, str(options.model), str(named), comparison, data, integrity, answers
    )


def pair_of(options: CompareOptions, heard: Listener) -> Pair:
    """Both models, checked without reading weights; `pruned` is a plan where it is a file.

    Raises:
        CheckpointError, UnsupportedModel: one of the models cannot be loaded.
        PlanError: the plan is of another model.
        DataError: the vocabularies differ.
    """
    trust, given = options.run.trust_remote_code, options.pruned
    original = inspect_model(str(options.model), trust_remote_code=trust)
    original.check_files()
    if isinstance(given, Plan | Planned) or is_file(given):
        return Pair(original, None, _checked_plan(options, plan_of(given), original, heard))
    pruned = inspect_model(str(given), trust_remote_code=trust)
    pruned.check_files()
    folders = [(model.source.folder, model.config) for model in (original, pruned)]
    check_vocabularies(*folders, trust_remote_code=trust)
    record = pruned.source.folder / "reap" / "plan.json"
    if not record.is_file():
        return Pair(original, pruned, None)
    return Pair(original, pruned, _checked_plan(options, Plan.load(record), original, heard))


def _checked_plan(options: CompareOptions, plan: Plan, original: Model, heard: Listener) -> Plan:
    """A plan that is the original's, or holds for it."""
    check_same_layers(plan, original.layers)
    force = options.force_model
    for note in check_model(plan, original.provenance, original.path, force=force):
        heard.note(note)
    return plan


def _read_data(options: CompareOptions, pair: Pair, heard: Listener) -> list[PackedSource]:
    """Tokens of all sources, by the original's tokenizer, in sequences both models can read."""
    data, run = options.data, options.run
    seq_len = min(sequence_length(model, data, run) for model in pair.models)
    for model in pair.models:
        check_packing(model, data)
    wanted = [_limited(source, options, seq_len) for source in sources_of(options, heard)]
    return read_data(pair.original, wanted, data, run, seq_len, heard)


def _limited(source: DataSource, options: CompareOptions, seq_len: int) -> DataSource:
    """A source with what `sequences` or `tokens` allows, unless it has a budget of its own."""
    if source.samples is not None or source.tokens is not None:
        return source
    if options.sequences is not None and options.data.packing == "none":
        return replace(source, samples=options.sequences)
    tokens = options.token_count if options.sequences is None else options.sequences * seq_len
    return replace(source, tokens=tokens)


def _compared(
    options: CompareOptions, pair: Pair, sources: Sequence[PackedSource], heard: Listener
) -> tuple[Comparison, dict[str, Orphans] | None]:
    """Runs the models; counts orphans where the plan is known and the original is in memory.

    Raises:
        ResourceError: they do not fit; or a plan, and the original would have to be streamed.
        DataError: nothing counts, or logits are not finite.
    """
    run = options.run
    check_backend("compare", device_of(run), pair.original.meta.dtype, run.backend)
    decision = None if run.device_map is not None else _decided(options, pair, sources)
    size = (run.batch_size or 1) if decision is None else decision.batch_size
    sizes = [min(size, source.full_sequences) for source in sources]
    # Both models get the same inputs, so only what both can take.
    layers = [layer for model in pair.models for layer in model.layers]
    batches = batches_of(pair.original.config, layers, sources, sizes)
    total = sum(source.tokens for source in sources)
    draws, seed = options.draws, options.data.seed
    if decision is not None and decision.stream:
        for reason in decision.reasons:
            heard.note(f"streaming both models: {reason}")
        if pair.plan is not None:
            heard.note("orphans are not counted of streamed models")
        with heard.progress("comparing", "tok", total) as progress:
            sums = _streamed(options, pair, decision, batches, lambda s: progress.add(s * total))
        return sums.comparison(draws, seed), None
    with contextlib.ExitStack() as stack:
        loaded = [stack.enter_context(_loaded(options, model, heard)) for model in pair.models]
        pruned = pair.plan if pair.pruned is None else loaded[1]
        assert pruned is not None
        with heard.progress("comparing", "tok", total) as progress:
            sums = compare_resident(
                loaded[0],
                pruned,
                batches,
                range(len(batches)),
                backend=run.backend,
                done=lambda share: progress.add(share * total),
            )
        lost = None if pair.plan is None else _orphans(loaded[0], batches, pair.plan, total, heard)
    return sums.comparison(draws, seed), lost


def _decided(options: CompareOptions, pair: Pair, sources: Sequence[PackedSource]) -> Decision:
    """Decides how both models are held.

    Raises:
        ResourceError: see `decide`; or a plan, and the original does not fit in memory.
    """
    run = options.run
    device = device_of(run)
    each = [sized(run, model, sources, device, all_logits=True) for model in pair.models]
    sizes, (work, *_) = zip(*each, strict=True)
    machine = this_machine(device, Path(tempfile.gettempdir()))
    decision = decide(run.stream, _together(sizes), machine, work)
    if decision.stream and pair.pruned is None:
        path = pair.original.path
        raise ResourceError(
            f"{path} would be streamed ({'; '.join(decision.reasons)}), and routers are masked in "
            f"memory only; write the checkpoint with `reap-kernels apply {path} PLAN --out DIR` "
            "and compare with that"
        )
    return decision


def _together(sizes: Sequence[ModelSizes]) -> ModelSizes:
    """Sizes of both models together."""
    return replace(
        sizes[0],
        layer_bytes=tuple(nbytes for each in sizes for nbytes in each.layer_bytes),
        rest_bytes=sum(each.rest_bytes for each in sizes),
        state_bytes=sum(each.state_bytes for each in sizes),
    )


@contextlib.contextmanager
def _loaded(options: CompareOptions, model: Model, heard: Listener) -> Iterator[PreTrainedModel]:
    """One model in memory; what a device map puts on the disk goes to the temporary folder."""
    beside = Path(tempfile.gettempdir(), "reap-compare")
    with in_memory(model.path, options.run, beside, heard) as loaded:
        model.check_unchanged()
        yield loaded


def _streamed(
    options: CompareOptions, pair: Pair, decision: Decision, batches: PackedBatches, done: Any
) -> Sums:
    """Both models, one decoder layer at a time."""
    run, place = options.run, decision.offload or "device"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reap-states-")))
        models, stores = [], []
        for number, model in enumerate(pair.models):
            device, how = device_of(run), load_options(run)
            models.append(stack.enter_context(open_streamed(model.path, device=device, **how)))
            model.check_unchanged()
            stores.append(StateStore(place, device, folder / str(number)))
            stack.callback(stores[-1].close)
        return compare_streamed(
            models, stores, batches, range(len(batches)), backend=run.backend, done=done
        )


def _orphans(
    model: PreTrainedModel, batches: PackedBatches, plan: Plan, total: int, heard: Listener
) -> dict[str, Orphans]:
    """Runs the original once more, and follows its routing."""
    with heard.progress("following the routing", "tok", total) as progress:

        def each() -> Iterator[dict[str, Any]]:
            for number in range(len(batches)):
                yield batches.inputs(number)
                progress.add(total / len(batches))

        return orphans(model, each(), plan)


def _evaluated(
    options: CompareOptions, pair: Pair, heard: Listener
) -> tuple[tasks.Results, tasks.Results]:
    """Tasks by the original and by the pruned model, one in memory at a time."""
    given = template_of(options.data)
    how: dict[str, Any] = {
        "folder": options.task_folder,
        "limit": options.limit,
        "apply_chat_template": options.apply_chat_template,
        "chat_template": None if given is None else given.template,
        "batch_size": options.run.batch_size or 1,
        "trust_remote_code": options.run.trust_remote_code,
    }

    def answers(model: PreTrainedModel, plan: Plan | None = None) -> tasks.Results:
        kept = None if plan is None else plan.kept
        return tasks.evaluate(model, pair.original.path, options.tasks, kept=kept, **how)

    with _loaded(options, pair.original, heard) as original:
        first = answers(original)
        if pair.pruned is None:
            return first, answers(original, pair.plan)
    with _loaded(options, pair.pruned, heard) as pruned:
        return first, answers(pruned)


def _integrity(
    options: CompareOptions, pair: Pair, lost: dict[str, Orphans] | None, heard: Listener
) -> dict[str, Any]:
    """What the plan does to the original's routing, where that is known, over all layers."""
    found: dict[str, Any] = {}
    if lost:
        layers = list(lost.values())
        tokens = sum(layer.tokens for layer in layers)
        found |= {
            "orphan_rate": sum(layer.orphaned for layer in layers) / max(1, tokens),
            "stranded_rate": sum(layer.stranded for layer in layers) / max(1, tokens),
            "retained_gate_share": sum(la.router_weight_share * la.tokens for la in layers)
            / max(1, tokens),
            "orphans_by_layer": {name: la.rate for name, la in lost.items()},
        }
    if pair.pruned is None or pair.plan is None:
        return found
    stats = pair.pruned.source.folder / "reap" / "stats.safetensors"
    found |= _calibration(stats, pair.plan, heard)
    names = [layer.name for layer in pair.original.layers]
    checked = min(_CHECKED_LAYERS, len(decoder_layers(pair.original.meta, names)))
    problems = check_permutation(
        pair.original.path,
        pair.pruned.path,
        pair.plan,
        sample=checked,
        trust_remote_code=options.run.trust_remote_code,
    )
    return {**found, "layers_checked": checked, "misplaced": problems}


def _calibration(path: Path, plan: Plan, heard: Listener) -> dict[str, Any]:
    """What the kept experts did on the data that chose them, where the statistics are there."""
    if not is_file(path):
        return {}
    try:
        shares = list(retained(SaliencyStats.load(path), plan).values())
    except (DataError, PlanError) as error:  # no reason to lose what was measured
        heard.note(f"what kept experts did on the calibration data is not known: {error}")
        return {}
    return {
        "calibration_gate_share": sum(layer.router_weight_share for layer in shares) / len(shares),
        "calibration_saliency_share": sum(layer.saliency_share for layer in shares) / len(shares),
        "dead_kept": sum(len(layer.dead_kept) for layer in shares),
        "dead_removed": sum(len(layer.dead_removed) for layer in shares),
    }
