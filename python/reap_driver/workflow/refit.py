"""Re-fitting: solves a pruned model's down projections again, evaluates that, and writes the better
one.

The sequences of each source are divided into eight folds: six are fitted, one chooses ridges and
judges each layer, and one, which neither sees, evaluates the outcome.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from reap_driver.base.interrupts import Interrupted, Stop, deferred
from reap_driver.data.batches import PackedBatches
from reap_driver.data.packing import PackedSource
from reap_driver.data.source import DataSource
from reap_driver.evaluation.comparison_file import MANY
from reap_driver.evaluation.vocabularies import check_vocabularies
from reap_driver.files.checkpoint import RECORD, open_checkpoint
from reap_driver.files.digest import weights_digest
from reap_driver.files.quantization import quantization_of
from reap_driver.load.streamed_model import open_streamed
from reap_driver.observation.data_parallel import Ranks, ranks
from reap_driver.planning.plan import Plan
from reap_driver.refitting.engine import LayerFacts, Refit, refit_layers
from reap_driver.workflow.calibration import batches_of, read_data
from reap_driver.workflow.comparing import Candidate, Subjects, Text, compared
from reap_driver.workflow.complete import Complete, finished, made_by
from reap_driver.workflow.errors import OptionError
from reap_driver.workflow.follow_up_jobs import RefitOptions
from reap_driver.workflow.holding import Holding, load_options
from reap_driver.workflow.identity import asked_for, environment
from reap_driver.workflow.inspection import (
    Model,
    check_packing,
    device_of,
    inspect_model,
    sequence_length,
)
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.outputs import check_replaced_folder, inputs_of
from reap_driver.workflow.refit_estimate import RefitEstimate, estimated, fitting
from reap_driver.workflow.refit_results import (
    CUT,
    REFIT,
    RefitEvaluation,
    Refitted,
    Written,
    card_rows,
    outcome,
    record,
    solved_line,
)
from reap_driver.workflow.refit_state import RefitState
from reap_driver.workflow.sources import divided_sources
from reap_driver.writer.new_experts import refuse_quantized
from reap_driver.writer.replace import RECORD_FILE, rewrite
from reap_driver.writer.staging import check_target
from reap_kernels.errors import DataError

FOLDS, CHOOSING, EVALUATING = 8, 6, 7  # folds of each source, counted from 0
DRAWS = 2000


def refit(
    options: RefitOptions, listener: Listener | None = None
) -> Refitted | RefitEstimate | Complete | None:
    """Re-fits a pruned model; see `reap_driver.refit`.

    Returns:
        What was done, or with `dry_run` what it would take; None on ranks other than the first.
    """
    heard = Collector(listener)
    with ranks() as world:
        heard.only(world.rank == 0)
        job = _Refitting(options, world, heard)
        job.inspect()
        job.read_data()
        if options.dry_run:
            return estimated(options, job.original, job.pruned, job.fitted, world, heard)
        if job.complete():
            return finished(job.out, heard) if world.rank == 0 else None
        return job.run()


@dataclass
class _Refitting:
    """One re-fit.

    Attributes:
        options: of the job.
        world: the processes that share the data.
        heard: receives notes and progress.
        original, pruned: what is known of the models, once `inspect` was called.
        fitted: the data, once `read_data` was called.
        held: the data of groups that are held out, which are only evaluated.
        validating: the data to evaluate on in place of a fold; empty if none was given.
    """

    options: RefitOptions
    world: Ranks
    heard: Collector

    def __post_init__(self) -> None:
        options = self.options
        self.original: Model
        self.pruned: Model
        self.fitted: list[PackedSource]
        self.held: list[PackedSource]
        self.validating: list[PackedSource]
        if options.dry_run:
            return
        assert isinstance(options.out, Path)  # as options that were checked have it
        self.out = options.out
        check_replaced_folder(self.out, inputs_of(options, self.out))
        self.state = RefitState(
            self.out.absolute().with_name(f"{self.out.absolute().name}.refit"), self.world
        )
        self.state.check(options.resume, overwrite=options.overwrite)

    def inspect(self) -> None:
        """Checks both models, and the output, without reading weights."""
        trust = self.options.run.trust_remote_code
        paths = str(self.options.original), str(self.options.pruned)
        self.original, self.pruned = (inspect_model(p, trust_remote_code=trust) for p in paths)
        both = (self.original, self.pruned)
        for model in both:
            model.check_files()
        if self.original.source.folder.resolve() == self.pruned.source.folder.resolve():
            raise OptionError(
                f"`original={paths[0]}`: is the pruned checkpoint itself; give the model that it "
                "was made from"
            )
        folders = [(model.source.folder, model.config) for model in both]
        check_vocabularies(folders[0], folders[1], trust_remote_code=trust)
        source = self.pruned.source
        refuse_quantized(source.folder, quantization_of(source))
        if not self.options.dry_run:
            replaced = self.options.overwrite or self.options.resume == "auto"
            check_target(self.out.absolute(), source.folder, overwrite=replaced)

    def read_data(self) -> None:
        """Reads all data by the original's tokenizer, in sequences that both models can read."""
        options = self.options
        data, run = options.data, options.run
        seq_len = min(sequence_length(m, data, run) for m in (self.original, self.pruned))
        for model in (self.original, self.pruned):
            check_packing(model, data)
        wanted, held = divided_sources(options, self.heard)
        own = [DataSource.parse(text) for text in options.texts]
        found = read_data(self.original, [*wanted, *held, *own], data, run, seq_len, self.heard)
        self.fitted = found[: len(wanted)]
        self.held = found[len(wanted) : len(wanted) + len(held)]
        self.validating = found[len(wanted) + len(held) :]
        self._check_enough()

    def _check_enough(self) -> None:
        """Raises DataError unless there are sequences to fit, to choose by and to evaluate."""
        most = max(source.sequences for source in self.fitted)
        needed = FOLDS - bool(self.validating)
        if most < needed:
            raise DataError(
                f"the data is at most {most} sequences in a source, too few to fit some, choose "
                f"ridges by some and evaluate on others; give a source with {needed} or more, by "
                "more text or a smaller `seq_len`"
            )
        if self.validating:
            return
        without = [s.source.group for s in [*self.fitted, *self.held] if s.sequences < FOLDS]
        for group in dict.fromkeys(without):
            self.heard.note(
                f"group {group}: has a source with fewer than {FOLDS} sequences, none of which is "
                "left to evaluate on"
            )

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What the command asks for, once `read_data` was called."""
        options = self.options
        base = asked_for(self.original, self.fitted, options.data, options.run, FOLDS)
        other: dict[str, Any] = {
            "pruned": self.pruned.provenance["model"]["config_digest"],
            "pruned weights": weights_digest(self.pruned.source),
            "steps": options.steps,
            "ridge": options.ridge,
            "keep the re-fit": options.keep_refit,
        }
        for name, sources in (("held out", self.held), ("validation", self.validating)):
            for number, source in enumerate(sources, 1):
                facts = source.provenance()
                other[f"{name} {number}"] = f"{facts['group']}: {facts['digest']}"
        return {**base, **other}

    def complete(self) -> bool:
        """With `resume='auto'`, whether this command has written its output already; what is left
        of its state is deleted. Ranks agree, as the first one finds.
        """
        if self.options.resume != "auto":
            return False

        def both() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
            open_checkpoint(self.out)  # all its files are there
            known = MANY.read(self.out / RECORD / RECORD_FILE)
            return known.get("refit", {}).get("run", {}), self.asked

        mine = self.world.rank == 0 and made_by(self.out, both, overwrite=self.options.overwrite)
        if self.world.of_first(str(mine)) != "True":
            return False
        if self.world.rank == 0:
            self.state.remove()
        return True

    def run(self) -> Refitted | None:
        """Re-fits, evaluates and writes."""
        with self.state.locked():
            layers, tokens, seconds = self._solved()
            self.world.barrier()
            if self.world.rank > 0:
                return None
            self.heard.say(solved_line(layers, tokens, seconds))
            evaluation = self._evaluated(self.state.matrices)
            self.heard.say(evaluation.describe())
            found = self._write(layers, evaluation, tokens, seconds)
            self.state.remove()
        self.heard.say(found.decision())
        return found

    def _solved(self) -> tuple[dict[str, LayerFacts], int, float]:
        """Runs the re-fit layer by layer; the new down projections are in the state's folder.

        Returns:
            The facts of each layer, tokens of the sequences used, and seconds.
        """
        options, world = self.options, self.world
        run = options.run
        decision = fitting(options, self.original, self.pruned, self.fitted, world, self.out.parent)
        sizes = [min(decision.batch_size, source.full_sequences) for source in self.fitted]
        layers = [*self.original.layers, *self.pruned.layers]
        batches = batches_of(self.original.config, layers, self.fitted, sizes, FOLDS)
        how = Holding(True, decision.offload or "device", sizes)
        self.state.begin(self.asked, environment(run, how, world), self.pruned, options.resume)
        used = [n for n in range(len(batches)) if self.validating or not _evaluates(batches, n)]
        held = [batches.fold(number) == CHOOSING for number in range(len(batches))]
        tokens = sum(batches.tokens(number) for number in used)
        text = "finishing the layer, then ending; press Ctrl-C again to end without"
        device, load = device_of(run, world), load_options(run)
        with (
            _interruptions(self.state, self.heard, text) as stop,
            open_streamed(self.original.path, device=device, **load) as full,
            open_streamed(self.pruned.path, device=device, **load) as cut,
            self.heard.progress("re-fitting", "tok", tokens) as progress,
        ):
            for model in (self.original, self.pruned):
                model.check_unchanged()
            job = Refit(
                batches,
                [used[place] for place in world.share(len(used))],
                held,
                self.state.put,
                options.ridge,
                options.steps,
                run.backend,
                how.offload,
                self.state.states,
                self.state,
                world,
                stop,
                done=lambda share: progress.add(share * tokens),
            )
            found = refit_layers(job, full, cut)
        return found, tokens, self.state.seconds

    def _evaluated(self, matrices: Mapping[str, Tensor]) -> RefitEvaluation:
        """Both models on text that was not fitted."""
        if self.validating:
            text = Text(self.validating)
        else:
            text = Text([*self.fitted, *self.held], FOLDS, _evaluates)
        candidates = [
            Candidate(CUT, self.pruned, None),
            Candidate(REFIT, self.pruned, None, matrices),
        ]
        sums, _ = compared(Subjects(self.original, candidates), self.options.run, text, self.heard)
        cut, refitted = (one.comparison(DRAWS, self.options.data.seed) for one in sums)
        names = set(cut.by_group)
        known = self._calibrated()
        for group in sorted(names & {source.source.group for source in self.held} & known):
            self.heard.note(f"group {group}: is not fitted, but the cut was calibrated on it")
        return RefitEvaluation(
            self.original.path,
            self.pruned.path,
            cut,
            refitted,
            [source.provenance() for source in text.sources if source.source.group in names],
            tuple(sorted(names - known)),
        )

    def _calibrated(self) -> set[str]:
        """Groups that were fitted, or that the cut was calibrated on, as far as that is known."""
        plan = self.pruned.source.folder / RECORD / "plan.json"
        known = Plan.load(plan).calibrated_on if plan.is_file() else ()
        return {*known, *(source.source.group for source in self.fitted)}

    def _write(
        self,
        layers: dict[str, LayerFacts],
        evaluation: RefitEvaluation,
        tokens: int,
        seconds: float,
    ) -> Refitted:
        """Writes the better one."""
        options = self.options
        matrices = self.state.matrices
        refitted = matrices and (options.keep_refit or evaluation.better == "refit")
        written: Written = "refit" if refitted else "cut"
        found = {
            **evaluation.comparisons().facts(),
            "refit": outcome(written, layers, evaluation, seconds),
        }
        data = [source.provenance() for source in self.fitted]
        with self.heard.progress("writing", "B") as progress:
            report = rewrite(
                self.pruned.path,
                matrices if refitted else {},
                self.out,
                record=record(found, self.asked, data),
                facts=card_rows(layers, evaluation, options.steps, tokens),
                figures=evaluation.rows(),
                overwrite=options.overwrite,
                trust_remote_code=options.run.trust_remote_code,
                progress=progress.reach,
            )
        for warning in report.warnings:
            self.heard.note(warning)
        notes = self.heard.notes
        return Refitted(notes, self.out, written, layers, evaluation, tokens, seconds, report)


def _evaluates(batches: PackedBatches, number: int) -> bool:
    """Whether a batch is of the fold that only the evaluation reads."""
    return batches.fold(number) == EVALUATING


@contextlib.contextmanager
def _interruptions(state: RefitState, heard: Listener, text: str) -> Iterator[Stop]:
    """Ends the run between two layers where that is asked for, and says how to go on."""
    try:
        with deferred(lambda: heard.note(text)) as stop:
            yield stop
    except Interrupted as error:
        raise Interrupted(f"{error}{state.left()}", error.number) from error
