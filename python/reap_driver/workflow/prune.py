"""Pruning in one: observes, plans, and writes the checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.observation.data_parallel import ranks
from reap_driver.workflow.apply import Applied, report_facts, writer_arguments
from reap_driver.workflow.inspection import Model, check_groups
from reap_driver.workflow.jobs import PruneOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.observe import Observed, Observing
from reap_driver.workflow.outputs import check_file, check_replaced_folder, inputs_of
from reap_driver.workflow.plan import Planned, advice, decision_margin
from reap_driver.workflow.ranking import foreseen, planned, scored
from reap_driver.workflow.results import Result
from reap_driver.writer.apply import apply_plan, check_plan


@dataclass(frozen=True, repr=False)
class Pruned(Result):
    """A model that was pruned.

    Attributes:
        out: the folder of the new checkpoint.
        observed: the statistics, and what they are of.
        planned: the plan.
        applied: what the writer did.

    Example:
        >>> pruned = rd.prune("MODEL", "code.jsonl:40", ratio=0.5, out="pruned", seq_len=64)
        >>> pruned.applied.report.experts_after
        16
    """

    out: Path
    observed: Observed
    planned: Planned
    applied: Applied

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        return {
            "out": str(self.out),
            **self.observed.facts(),
            **self.planned.facts(),
            **report_facts(self.applied.report),
        }

    def describe(self) -> str:
        """See `Result`."""
        steps: tuple[Result, ...] = (self.observed, self.planned, self.applied)
        return "\n".join(step.describe() for step in steps)


def prune(options: PruneOptions, listener: Listener | None = None) -> Pruned | None:
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
        job = Observing(options, out.absolute(), world, heard)
        inputs = inputs_of(options, out, stats)
        if stats is not None:
            check_file(stats, overwrite=options.overwrite, inputs=inputs)
            inputs.append(stats)  # it stays
        check_replaced_folder(out, inputs)
        job.check_journal()
        job.inspect()
        job.model.check_files()
        if world.rank == 0:  # the one that writes
            _check_writing(options, out, job.model, heard)
        world.barrier()
        check_groups(job.wanted, options.rank.weights)
        job.read_data()
        with job.observed() as found:
            return None if found is None else _write(options, out, job.model, found, heard)


def _check_writing(options: PruneOptions, out: Path, model: Model, heard: Listener) -> None:
    """Checks early that what will be planned can be written."""
    # Plans that remove as many of each layer need the same space and pass the same checks.
    plans = foreseen(model.blank_scores(), options.rank, options.budget, options.allocation)
    for blank in plans:
        check_plan(model.path, blank, out, **_writing(options))
    for text in advice(plans[0], model.provenance["layers"]):
        heard.note(text)


def _writing(options: PruneOptions) -> dict[str, Any]:
    return writer_arguments(
        options.write, overwrite=options.overwrite, trust=options.run.trust_remote_code
    )


def _write(
    options: PruneOptions, out: Path, model: Model, found: Observed, heard: Collector
) -> Pruned:
    """Ranks, plans, and writes the checkpoint."""
    stats = found.stats
    heard.say(found.describe())
    if isinstance(options.stats, Path):
        stats.save(options.stats)
    scores = scored(stats, options.rank)
    plan = planned(scores, options.rank, options.budget, options.allocation, stats)
    inside = decision_margin(plan, stats, heard)
    for note in plan.notes:
        heard.note(note)
    made = Planned(heard.notes, plan, inside)
    heard.say(made.describe())

    model.check_unchanged()  # the plan is of the files that were observed
    with heard.progress("writing", "B") as progress:
        report = apply_plan(
            model.path, plan, out, progress=progress.reach, stats=stats, **_writing(options)
        )
    for warning in report.warnings:
        heard.note(warning)
    written = Applied(heard.notes, out, report)
    heard.say(written.describe())
    return Pruned(heard.notes, out, found, made, written)
