"""Pruning in one: observes, plans, and writes the checkpoint."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.files.checkpoint import RECORD, open_checkpoint
from reap_driver.files.gram_folder import GramFolder
from reap_driver.observation.data_parallel import ranks
from reap_driver.observation.resume_file import difference
from reap_driver.planning.plan import Plan
from reap_driver.planning.serving import served_advice
from reap_driver.workflow.apply import Applied, report_facts, writer_arguments
from reap_driver.workflow.complete import Complete, finished, made_by
from reap_driver.workflow.inspection import Model, check_groups
from reap_driver.workflow.jobs import PruneOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.observe import Observed, Observing, run_of
from reap_driver.workflow.outputs import (
    GRAMS,
    MATRICES,
    check_file,
    check_filled_folder,
    check_replaced_folder,
    inputs_of,
)
from reap_driver.workflow.plan import Planned, decision_margin
from reap_driver.workflow.ranking import foreseen, scored
from reap_driver.workflow.refit_results import Refitted
from reap_driver.workflow.results import Result
from reap_driver.workflow.shape_choice import ShapeChoice
from reap_driver.workflow.shape_plans import Evidence, plan_of_shape
from reap_driver.workflow.sizes import Sizing, foreseen_amount, sized_plan, sizing_of
from reap_driver.writer.apply import apply_plan, check_plan
from reap_kernels import SaliencyStats
from reap_kernels.documents import as_read
from reap_kernels.files import is_file


@dataclass(frozen=True, repr=False)
class Pruned(Result):
    """A model that was pruned.

    Attributes:
        out: the folder of the new checkpoint.
        observed: the statistics, and what they are of.
        planned: the plan.
        applied: what the writer did.
        refitted: the re-fit of what is left; None without one. `applied` then wrote to a folder
            that is gone.

    Example:
        >>> pruned = rd.prune("MODEL", "code.jsonl:40", ratio=0.5, out="pruned", seq_len=64)
        >>> pruned.applied.report.experts_after
        16
    """

    out: Path
    observed: Observed
    planned: Planned
    applied: Applied
    refitted: Refitted | None = None

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        return {
            "out": str(self.out),
            **self.observed.facts(),
            **self.planned.facts(),
            **report_facts(self.applied.report),
            **({} if self.refitted is None else {"refitted": self.refitted.facts()}),
        }

    def describe(self) -> str:
        """See `Result`."""
        steps = (self.observed, self.planned, self.applied, self.refitted)
        return "\n".join(step.describe() for step in steps if step is not None)


def prune(options: PruneOptions, listener: Listener | None = None) -> Pruned | Complete | None:
    """Prunes a model; see `reap_driver.prune`.

    Returns:
        What was done; None on ranks other than the first, which have nothing to write.
    """
    heard = Collector(listener)
    out = options.out
    assert isinstance(out, Path)  # as options that were checked have it
    stats = options.stats if isinstance(options.stats, Path) else None
    with ranks() as world:
        heard.only(world.rank == 0)
        gram = _gram_beside(out) if options.shape.shape is not None else None
        job = Observing(options, out.absolute(), world, heard, gram)
        inputs = inputs_of(options, out, stats)
        resume = options.journal.resume
        if stats is not None:  # where a run goes on, it may have been written: see `_check_own`
            check_file(stats, overwrite=options.overwrite or bool(resume), inputs=inputs)
            inputs.append(stats)  # it stays
        check_replaced_folder(out, inputs)
        if gram is not None:  # what an interrupted run left may be used, or is replaced
            check_filled_folder(gram, GRAMS, overwrite=True)
            check_filled_folder(_matrices_beside(out), MATRICES, overwrite=True)
        job.check_journal()
        job.inspect()
        job.check_files()
        sizing = _sizing(options, job.model)
        there = resume == "auto" and os.path.lexists(out)  # it may be the output of this command
        if world.rank == 0 and not there:  # the one that writes
            _check_writing(options, out, job.model, sizing, heard)
        world.barrier()
        check_groups(job.wanted, options.rank.weights)
        job.read_data()
        if job.complete({out: lambda: _both(options, out, sizing, job.asked)}):
            if world.rank > 0:
                return None
            _remove(gram)
            if stats is not None and not stats.exists():
                SaliencyStats.load(out / RECORD / "stats.safetensors").save(stats)
                heard.note(f"{stats}: was missing, and is written again from {out / RECORD}")
            return finished(out, heard)
        if world.rank == 0:
            _check_own(options, stats, job.asked)
            if there:
                _check_writing(options, out, job.model, sizing, heard)
        world.barrier()
        with _kept_for_journal(gram, options.journal.journal), job.observed() as found:
            if found is None:
                return None
            pruned = _write(options, out, job, sizing, found, heard)
            _remove(gram)
            return pruned


def _gram_beside(out: Path) -> Path:
    """Where the Gram matrices of a run are until its output is written."""
    return out.absolute().with_name(f"{out.name}.prune-gram")


def _matrices_beside(out: Path) -> Path:
    """The same of the new down projections."""
    return out.absolute().with_name(f"{out.name}.prune-matrices")


def _remove(folder: Path | None) -> None:
    """Removes what is needed no more."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _kept_for_journal(gram: Path | None, journal: bool) -> Iterator[None]:
    """Inside, an error leaves the Gram matrices only where a journal goes on from them."""
    try:
        yield
    except BaseException:
        if not journal:
            _remove(gram)
        raise


def _sizing(options: PruneOptions, model: Model) -> Sizing | None:
    """The model's sizes, where one of them decides how much goes."""
    if options.rank.limit is None:
        return None
    run = options.run
    return sizing_of(model, options.write, dtype=run.dtype, trust=run.trust_remote_code)


def _both(
    options: PruneOptions, out: Path, sizing: Sizing | None, asked: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a checkpoint records of the command that made it, and what is asked for now.

    Raises:
        CheckpointError, DataError, PlanError: it or its record is damaged.
    """
    plan, stats = out / RECORD / "plan.json", out / RECORD / "stats.safetensors"
    if not (is_file(plan) and is_file(stats)):
        return {}, asked
    open_checkpoint(out)  # all its files are there
    known = SaliencyStats.load(stats)
    run = known.provenance.get("run", {})
    if difference(run, as_read(dict(asked))) is not None:
        return run, asked
    now = _decided(options, _foreseen_or_planned(options, sizing, known))
    return Plan.load(plan).run, {**asked, **now}


def _foreseen_or_planned(
    options: PruneOptions, sizing: Sizing | None, stats: SaliencyStats
) -> Plan:
    """The plan that the options ask for, as far as statistics tell: not its neurons."""
    if options.shape.shape is None:
        return _planned(options, sizing, stats)
    scores = scored(stats, options.rank)
    return ShapeChoice.of(options.shape, options.rank, scores, stats).foreseen()


def _planned(options: PruneOptions, sizing: Sizing | None, stats: SaliencyStats) -> Plan:
    """The plan that the options ask for, by statistics of the model."""
    scores = scored(stats, options.rank)
    return sized_plan(sizing, scores, options.rank, options.budget, options.allocation, stats)


def _decided(options: PruneOptions, plan: Plan) -> dict[str, Any]:
    """What is asked for besides an observation, files and names of layers resolved."""
    kept = sum(len(layer.kept) for layer in plan.layers.values())
    # The number of a shape is in the settings, unless it is known in the end only.
    experts = {"experts kept": kept} if options.shape.shape is None else {}
    return {
        "criterion": plan.criterion,
        "weights": plan.weights,
        "allocation": plan.allocation,
        "ratio": plan.ratio,
        "settings": plan.settings,
        **experts,
        **({"refit": True} if options.refit else {}),
        **dataclasses.asdict(options.write),
    }


def _check_own(options: PruneOptions, stats: Path | None, asked: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a run that goes on would replace statistics not its own."""
    if stats is not None and not options.overwrite:
        made_by(stats, lambda: (run_of(stats), asked), overwrite=False)


def _check_writing(
    options: PruneOptions, out: Path, model: Model, sizing: Sizing | None, heard: Listener
) -> None:
    """Checks early that what will be planned can be written."""
    rank, budget, allocation = options.rank, options.budget, options.allocation
    blank = model.blank_scores()
    # Plans that remove as many of each layer need the same space and pass the same checks.
    if options.shape.shape is not None:
        plans = [ShapeChoice.of(options.shape, rank, blank).foreseen()]
    else:
        amount = None if sizing is None else foreseen_amount(sizing, rank, budget, allocation)
        plans = foreseen(blank, rank, budget, allocation, amount)
    for plan in plans:
        check_plan(model.path, plan, out, **_writing(options))
    if sizing is not None:
        for line in sizing.leaves(sizing.largest(plans), rank).lines():
            heard.say(line)
    for text in served_advice(plans[0], model.provenance["layers"]):
        heard.note(text)


def _writing(options: PruneOptions) -> dict[str, Any]:
    return writer_arguments(
        options.write, overwrite=options.overwrite, trust=options.run.trust_remote_code
    )


def _write(
    options: PruneOptions,
    out: Path,
    job: Observing,
    sizing: Sizing | None,
    found: Observed,
    heard: Collector,
) -> Pruned:
    """Ranks, plans, and writes the checkpoint."""
    found = dataclasses.replace(found, gram=None)  # it is not kept
    stats = found.stats
    heard.say(found.describe())
    if isinstance(options.stats, Path):
        stats.save(options.stats)
    with _plan(options, out, job, sizing, stats, heard) as (plan, matrices):
        plan = dataclasses.replace(plan, run={**job.asked, **_decided(options, plan)})
        inside = decision_margin(plan, stats, heard)
        for note in plan.notes:
            heard.note(note)
        made = Planned(heard.notes, plan, inside)
        heard.say(made.describe())

        model = job.model
        model.check_unchanged()  # the plan is of the files that were observed
        with heard.progress("writing", "B") as progress:
            report = apply_plan(
                model.path,
                plan,
                out,
                progress=progress.reach,
                stats=stats,
                matrices=matrices,
                **_writing(options),
            )
    for note in [*report.plan.notes[len(plan.notes) :], *report.warnings]:
        heard.note(note)
    written = Applied(heard.notes, out, report)
    heard.say(written.describe())
    return Pruned(heard.notes, out, found, made, written)


@contextlib.contextmanager
def _plan(
    options: PruneOptions,
    out: Path,
    job: Observing,
    sizing: Sizing | None,
    stats: SaliencyStats,
    heard: Collector,
) -> Iterator[tuple[Plan, Path | None]]:
    """The plan, and the folder of its matrices, if it has any; inside only."""
    if options.shape.shape is None:
        yield _planned(options, sizing, stats), None
        return
    folder = _matrices_beside(out)
    _remove(folder)  # of a run that was killed
    try:
        scores, grams = scored(stats, options.rank), GramFolder.open(_gram_beside(out))
        trust = options.run.trust_remote_code
        evidence = Evidence(job.model, scores, stats, grams, trust)
        plan = plan_of_shape(options.shape, options.rank, evidence, folder, heard)
        yield plan, folder if plan.compensates else None
    finally:
        _remove(folder)
