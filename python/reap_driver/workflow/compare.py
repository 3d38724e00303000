"""Comparing: how closely pruned models follow their original, on the same batches."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.compat.decoder_layers import decoder_layers
from reap_driver.data.packing import PackedSource
from reap_driver.data.source import DataSource
from reap_driver.evaluation import tasks
from reap_driver.evaluation.audit import audit
from reap_driver.evaluation.compensation import PlannedModel
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.evaluation.routing import Orphans
from reap_driver.evaluation.sequences import Comparison
from reap_driver.evaluation.vocabularies import check_vocabularies
from reap_driver.files.quantization import quantization_of
from reap_driver.planning.plan import Plan
from reap_driver.planning.retained import retained
from reap_driver.workflow.calibration import read_data, template_of
from reap_driver.workflow.comparing import Candidate, Subjects, Text, compared, loaded
from reap_driver.workflow.comparison_results import (
    Compared,
    Comparisons,
    figures_table,
    integrity_lines,
    shared,
)
from reap_driver.workflow.errors import OptionError
from reap_driver.workflow.follow_up_jobs import CompareOptions
from reap_driver.workflow.inspection import (
    Model,
    check_packing,
    inspect_model,
    sequence_length,
)
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.plan import Planned, matrices_beside, plan_of
from reap_driver.workflow.sources import sources_of
from reap_driver.writer.plan_checks import check_model, check_same_layers, main_layers
from reap_driver.writer.plan_matrices import matrices_of
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, PlanError
from reap_kernels.files import is_file

# Of both checkpoints, spread evenly: enough to find experts that were written in another order.
_CHECKED_LAYERS = 4


def compare(options: CompareOptions, listener: Listener | None = None) -> Compared | Comparisons:
    """Compares pruned models with their original; see `reap_driver.compare`."""
    if options.tasks:
        tasks.check_installed()
    heard = Collector(listener)
    given = subjects(options, heard)
    names = [one.name for one in given.candidates]
    nothing: list[None] = [None] * len(names)
    found: Sequence[Comparison | None] = nothing
    data, integrity = [], [dict[str, Any]() for _ in names]
    strange: list[tuple[str, ...]] = [() for _ in names]
    if options.data.given:
        sources = _read_data(options, given, heard)
        sums, lost = compared(given, options.run, Text(sources), heard)
        figures = [one.comparison(options.draws, options.data.seed) for one in sums]
        found = figures
        data = [source.provenance() for source in sources]
        groups = {source.source.group for source in sources}
        strange = [_unseen(one.plan, groups) for one in given.candidates]
        heard.say(figures_table(dict(zip(names, figures, strict=True)), shared(strange)))
        each = zip(given.candidates, lost, strict=True)
        integrity = [_integrity(options, given, one, own, heard) for one, own in each]
        for name, known in zip(names, integrity, strict=True):
            if known:
                heard.say(integrity_lines(known, name if len(names) > 1 else ""))
    answers: Sequence[tuple[tasks.Results, tasks.Results] | None] = nothing
    if options.tasks:
        first, *others = _evaluated(options, given, heard)
        answers = [(first, other) for other in others]
        heard.say(tasks.table(first, dict(zip(names, others, strict=True))))
    model = str(options.model)
    results = [
        Compared(heard.notes, model, name, one, data, known, answered, unseen)
        for name, one, known, answered, unseen in zip(
            names, found, integrity, answers, strange, strict=True
        )
    ]
    return Comparisons(heard.notes, tuple(results)) if options.several else results[0]


def _unseen(plan: Plan | None, groups: Collection[str]) -> tuple[str, ...]:
    """Groups of the text that a plan was not calibrated on, as far as that is known."""
    known = () if plan is None else plan.calibrated_on
    return tuple(sorted(set(groups) - set(known))) if known else ()


def subjects(options: CompareOptions, heard: Listener) -> Subjects:
    """All models, checked without reading weights; a pruned one is a plan where it is a file.

    Raises:
        CheckpointError, UnsupportedModel: one of the models cannot be loaded.
        PlanError: the plan is of another model.
        DataError: the vocabularies differ.
        OptionError: one is given twice.
    """
    trust = options.run.trust_remote_code
    original = inspect_model(str(options.model), trust_remote_code=trust)
    original.check_files()
    each = []
    for number, (name, one) in enumerate(options.each, 1):
        candidate = _candidate(options, one, number, original, heard)
        each.append(replace(candidate, name=name or candidate.name))
    names = [one.name for one in each]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f"`pruned`: {twice} is given twice; name each model and plan once")
    return Subjects(original, each)


def _candidate(
    options: CompareOptions, given: Any, number: int, original: Model, heard: Listener
) -> Candidate:
    """A pruned model, or a plan, which is named by its number and criterion if it is no file."""
    trust = options.run.trust_remote_code
    if not isinstance(given, Plan | Planned | str | Path):
        raise OptionError(
            f"`pruned` has a {type(given).__name__}; give a checkpoint, a plan's file or a plan, "
            "such as rd.make_plan(scores, ratio=0.5), or several as a list or {name: plan}"
        )
    if not isinstance(given, str | Path) or is_file(given):
        plan = _checked_plan(options, plan_of(given), original, heard)
        name = f"plan {number}, {plan.criterion}" if options.several else "a plan"
        found = matrices_of(plan, None, matrices_beside(given))
        return Candidate(str(given) if isinstance(given, str | Path) else name, None, plan, found)
    pruned = inspect_model(str(given), trust_remote_code=trust)
    pruned.check_files()
    folders = [(model.source.folder, model.config) for model in (original, pruned)]
    check_vocabularies(*folders, trust_remote_code=trust)
    record, own = (model.source.folder / "reap" / "plan.json" for model in (pruned, original))
    if not record.is_file() or (own.is_file() and own.read_bytes() == record.read_bytes()):
        return Candidate(str(given), pruned, None)  # or one made of what the plan has left
    plan = _checked_plan(options, Plan.load(record), original, heard)
    return Candidate(str(given), pruned, plan)


def _checked_plan(options: CompareOptions, plan: Plan, original: Model, heard: Listener) -> Plan:
    """A plan that is the original's, or holds for it."""
    plan = main_layers(plan)
    check_same_layers(plan, original.layers)
    force = options.force_model
    for note in check_model(plan, original.provenance, original.path, force=force):
        heard.note(note)
    return plan


def _read_data(options: CompareOptions, given: Subjects, heard: Listener) -> list[PackedSource]:
    """Tokens of all sources, by the original's tokenizer, in sequences all models can read."""
    data, run = options.data, options.run
    seq_len = min(sequence_length(model, data, run) for model in given.models)
    for model in given.models:
        check_packing(model, data)
    wanted = [_limited(source, options, seq_len) for source in sources_of(options, heard)]
    return read_data(given.original, wanted, data, run, seq_len, heard)


def _limited(source: DataSource, options: CompareOptions, seq_len: int) -> DataSource:
    """A source with what `sequences` or `tokens` allows, unless it has a budget of its own."""
    if source.samples is not None or source.tokens is not None:
        return source
    if options.sequences is not None and options.data.packing == "none":
        return replace(source, samples=options.sequences)
    tokens = options.token_count if options.sequences is None else options.sequences * seq_len
    return replace(source, tokens=tokens)


def _evaluated(options: CompareOptions, given: Subjects, heard: Listener) -> list[tasks.Results]:
    """Tasks by the original and by each pruned model, one in memory at a time."""
    template = template_of(options.data)
    how: dict[str, Any] = {
        "folder": options.task_folder,
        "limit": options.limit,
        "apply_chat_template": options.apply_chat_template,
        "chat_template": None if template is None else template.template,
        "batch_size": options.run.batch_size or 1,
        "trust_remote_code": options.run.trust_remote_code,
    }

    def answers(model: PreTrainedModel, plan: PlannedModel | None = None) -> tasks.Results:
        return tasks.evaluate(model, given.original.path, options.tasks, plan=plan, **how)

    found: dict[int, tasks.Results] = {}
    with loaded(options.run, given.original, heard) as original:
        first = answers(original)
        for number, one in enumerate(given.candidates):
            if one.pruned is None:
                found[number] = answers(original, one.ready(RouterMasks(original)))
    for number, one in enumerate(given.candidates):
        if one.pruned is not None:
            with loaded(options.run, one.pruned, heard) as pruned:
                found[number] = answers(pruned)
    return [first, *(found[number] for number in sorted(found))]


def _integrity(
    options: CompareOptions,
    given: Subjects,
    one: Candidate,
    lost: dict[str, Orphans],
    heard: Listener,
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
    if one.pruned is None or one.plan is None:
        return found
    stats = one.pruned.source.folder / "reap" / "stats.safetensors"
    found |= _calibration(stats, one.plan, heard)
    before, now = (quantization_of(model.source).method for model in (given.original, one.pruned))
    if now not in (None, before):
        heard.note(
            f"{one.pruned.path}: was quantized after it was pruned, so its weights are not checked "
            "against the original's bit by bit"
        )
        return found
    names = [layer.name for layer in given.original.layers]
    checked = min(_CHECKED_LAYERS, len(decoder_layers(given.original.meta, names)))
    audited = audit(
        given.original.path,
        one.pruned.path,
        one.plan,
        sample=checked,
        trust=options.run.trust_remote_code,
    )
    solved = {"solved_again": audited.solved} if audited.solved else {}
    return {**found, "layers_checked": checked, "misplaced": audited.problems, **solved}


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
