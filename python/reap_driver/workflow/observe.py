"""Observing: runs a model on data, held as decided, with a journal, on one rank or many."""

import contextlib
import dataclasses
import functools
import glob
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reap_driver.base.interrupts import Stop, deferred
from reap_driver.base.units import short, took
from reap_driver.data.folds import FoldedBatches
from reap_driver.data.packing import PackedSource
from reap_driver.files.gram_folder import GramFolder
from reap_driver.observation import journal as journals
from reap_driver.observation.data_parallel import Ranks, ranks
from reap_driver.observation.gram_sums import GramRun, check_gram, load_grams, save_grams
from reap_driver.observation.journal import Entry, Journal
from reap_driver.observation.observer import Observer, observe
from reap_driver.observation.run import ObserverJournal, Run, run_resident, run_streamed
from reap_driver.observation.state_store import StateStore
from reap_driver.workflow.calibration import (
    batches_of,
    group_facts,
    group_lines,
    read_data,
)
from reap_driver.workflow.complete import Both, Complete, finished, made_by
from reap_driver.workflow.hardware import hardware
from reap_driver.workflow.holding import Held, Holding, decided, holding
from reap_driver.workflow.identity import asked_for, environment
from reap_driver.workflow.inspection import Model, check_packing, inspect_model, sequence_length
from reap_driver.workflow.jobs import ObserveOptions, PruneOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.mtp_choice import with_mtp_choice
from reap_driver.workflow.options import DataOptions, RunOptions
from reap_driver.workflow.outputs import (
    GRAMS,
    check_file,
    check_filled_folder,
    check_journal_folder,
    inputs_of,
)
from reap_driver.workflow.results import Result
from reap_driver.workflow.sources import sources_of
from reap_kernels import SaliencyStats
from reap_kernels.errors import CheckpointError


@dataclass(frozen=True, repr=False)
class Observed(Result):
    """What was observed.

    Attributes:
        stats: statistics of all ranks.
        seconds: the first rank ran, interrupted runs included.
        out: where the statistics were saved; None: nowhere.
        gram: the folder of Gram matrices; None if none were summed.

    Example:
        >>> observed = rd.observe_data("MODEL", "code.jsonl:40", seq_len=64)
        >>> observed.stats.groups
        ['code']
    """

    stats: SaliencyStats
    seconds: float
    out: Path | None = None
    gram: Path | None = None

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        sources = self.stats.provenance["data"]
        layers = self.stats.layers.values()
        out = {} if self.out is None else {"out": str(self.out)}
        gram = {} if self.gram is None else {"gram": str(self.gram)}
        return {
            **out,
            **gram,
            "layers": len(self.stats.layers),
            "groups": self.stats.groups,
            "group_data": group_facts(sources),
            "parts": len(self.stats.parts),
            "data": sources,
            "tokens": self.tokens,
            "experts": sum(layer.num_experts for layer in layers),
            "experts_never_routed": sum(
                int((layer.total().count == 0).sum().item()) for layer in layers
            ),
            "observe_seconds": round(self.seconds, 3),
        }

    @property
    def tokens(self) -> int:
        """Tokens the model ran on."""
        return sum(source["tokens"] for source in self.stats.provenance["data"])

    def describe(self) -> str:
        """See `Result`."""
        facts = self.facts()
        text = (
            f"observed {self.tokens:,} tokens in {facts['layers']} layers, {took(self.seconds)} "
            f"({short(self.tokens / self.seconds)} tokens/s)\n  {facts['experts_never_routed']} of "
            f"{facts['experts']} experts were never routed to"
        )
        return "\n".join([text, *group_lines(facts["data"])])


def observe_data(
    options: ObserveOptions, listener: Listener | None = None
) -> Observed | Complete | None:
    """Observes a model on data and saves the statistics; what can be checked early is.

    Returns:
        What was observed; None on ranks other than the first, which have nothing to write.
    """
    heard = Collector(listener)
    out = options.out
    gram = options.gram if isinstance(options.gram, Path) else None  # as once checked
    with ranks() as world, contextlib.ExitStack() as stack:
        heard.only(world.rank == 0)
        if isinstance(out, Path):
            # What is there may be the output of this command, see `complete`.
            replaced = options.overwrite or options.journal.resume == "auto"
            check_file(out, overwrite=replaced, inputs=inputs_of(options, out, gram))
            place = out.absolute()
            if gram is not None:
                check_filled_folder(gram, GRAMS, overwrite=replaced)
        else:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reap-")), "stats")
        job = Observing(options, place, world, heard, gram)
        job.check_journal()
        job.inspect()
        job.check_files()
        job.read_data()
        if isinstance(out, Path):
            made: dict[Path, Both] = {out: lambda: (run_of(out), job.asked)}
            if gram is not None:
                made[gram] = lambda: (gram_run_of(gram), job.asked)
            if job.complete(made):
                return finished(out, heard) if world.rank == 0 else None
        with job.observed() as found:
            if found is None:
                return None
            if isinstance(out, Path):
                found.stats.save(out)
                found = dataclasses.replace(found, out=out)
    heard.say(found.describe())
    return found


def run_of(path: Path) -> dict[str, Any]:
    """What statistics record of the command that made them; empty where they record nothing."""
    run: dict[str, Any] = SaliencyStats.load(path).provenance.get("run", {})
    return run


def gram_run_of(folder: Path) -> dict[str, Any]:
    """The same of a Gram folder."""
    run: dict[str, Any] = GramFolder.open(folder).provenance.get("run", {})
    return run


class Observing:
    """One observation, of `observe_data` or `prune`.

    Args:
        options: the options of the job.
        place: the output, beside which the journal and what memory cannot hold are.
        world: the processes that observe together.
        heard: receives notes and progress.
        gram: folder to write Gram matrices to; None to sum none.

    Attributes:
        wanted: the sources that are named.
        model: what is known of the model, once `inspect` was called.
        sources: the data, once `read_data` was called.
    """

    def __init__(
        self,
        options: ObserveOptions | PruneOptions,
        place: Path,
        world: Ranks,
        heard: Collector,
        gram: Path | None = None,
    ) -> None:
        self._options, self._place, self._ranks, self._heard = options, place, world, heard
        self._run: RunOptions = options.run
        self._data: DataOptions = options.data
        self._journals = options.journal.journal and options.out is not None
        self._folder = journal_folder(place, world)
        self._gram = None if gram is None else gram.absolute()
        self._grams: GramRun | None = None
        self.wanted = sources_of(options, heard)
        self.model: Model
        self.sources: list[PackedSource]

    def check_journal(self) -> None:
        """Checks the journal before any data is read.

        Raises:
            DataError: a run is to be resumed, and there is none.
            CheckpointError: an interrupted run left one, and neither `resume` nor `overwrite` is
                given; or its folder holds something else.
        """
        check_journal_folder(self._folder)
        if self._options.journal.resume or not self._options.overwrite:
            self._check_ranks()
        if self._resumes:
            journals.read(self._folder)
        elif journals.exists(self._folder) and self._journals and not self._options.overwrite:
            raise CheckpointError(
                f"{self._folder}: the journal of a run that was interrupted; give `resume=True` to "
                "go on from it, or `overwrite=True` to start anew"
            )

    def _check_ranks(self) -> None:
        """Raises CheckpointError where there are journals of another number of ranks."""
        size = self._ranks.size
        own = {journal_folder(self._place, Ranks(rank, size)) for rank in range(size)}
        for folder in sorted(self._place.parent.glob(f"{glob.escape(self._place.name)}.journal*")):
            if folder not in own and journals.exists(folder):
                run = journals.read(folder)["run"]
                raise CheckpointError(
                    f"{folder}: the journal of a run that was interrupted, as rank "
                    f"{run.get('rank')}, and now there are {size}; start as many processes as "
                    "then, or delete it and start again"
                )

    @property
    def _resumes(self) -> bool:
        """Whether this rank goes on from a journal."""
        resume = self._options.journal.resume
        return resume is True or (resume == "auto" and journals.exists(self._folder))

    def inspect(self) -> None:
        """Finds the model's layers; no weights are read."""
        trust = self._run.trust_remote_code
        self.model = inspect_model(str(self._options.model), trust_remote_code=trust)
        if self._gram is not None:
            check_gram(self.model.layers)

    def check_files(self) -> None:
        """Checks the model's files, and whether its multi-token-prediction layer is observed.

        Raises:
            CheckpointError, UnsupportedModel: see `Model.check_files` and `with_mtp_choice`.
        """
        self.model.check_files()
        keys = self.model.source.tensors
        self.model = with_mtp_choice(self.model, self._options, keys, self._heard)

    def read_data(self) -> None:
        """Reads, tokenizes and packs the data, in sequences that the model can read."""
        seq_len = sequence_length(self.model, self._data, self._run)
        check_packing(self.model, self._data)
        self.sources = read_data(
            self.model, self.wanted, self._data, self._run, seq_len, self._heard
        )

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What the command asks for, once `read_data` was called; see `asked_for`."""
        asked = asked_for(self.model, self.sources, self._data, self._run, self._options.folds)
        mtp = {"with_mtp": True} if self.model.mtp else {}
        fuse = {} if self._options.fuse is None else {"fuse": self._options.fuse}
        return {**asked, **mtp, **fuse}

    def complete(self, made: Mapping[Path, Both]) -> bool:
        """With `resume='auto'`, whether this command has made its outputs already.

        A journal that is left of it is deleted. Ranks agree, as the first one finds.

        Args:
            made: {output: see `made_by`}.

        Raises:
            CheckpointError, DataError: an output or the journal is of another command.
        """
        if self._options.journal.resume != "auto":
            return False
        overwrite = self._options.overwrite
        mine = self._ranks.rank == 0 and all(
            made_by(out, both, overwrite=overwrite) for out, both in made.items()
        )
        if not json.loads(self._ranks.of_first(json.dumps(mine))):
            return False
        if journals.exists(self._folder):
            journals.check_command(self._folder, self.asked)
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    @contextlib.contextmanager
    def observed(self) -> Iterator[Observed | None]:
        """Runs the model; the journal is deleted when the block ends without an error.

        Yields:
            What was observed; None on ranks other than the first.

        Raises:
            ResourceError: the model does not fit.
            Interrupted: on request; the text says how to go on.
            DataError: the journal is of another run; an expert gave NaN or Inf.
        """
        with contextlib.ExitStack() as stack:
            if self._journals:
                stack.enter_context(journals.locked(self._folder))
            recorded = journals.read(self._folder)["run"] if self._resumes else None
            how = self._agreed(recorded)
            run = {**self.asked, **environment(self._run, how, self._ranks)}
            journal = None
            if self._gram is not None:
                run["gram"] = True
                names = [layer.name for layer in self.model.layers]
                self._grams = GramRun(self._gram, names, run, self._ranks)
            if self._journals:
                journal = Journal(self._folder, run, self._options.journal.journal_every)
            entry = None
            if recorded is not None and journal is not None:
                entry = journal.resume()  # before anything else: it may be of another run
                done = f"{'layer' if how.stream else 'batch'} {entry.position}"
                self._heard.note(f"continuing from {self._folder}, written after {done}")
            elif journal is not None:
                journal.remove()  # of a run that is started anew
            if self._grams is not None:
                if entry is None:
                    self._grams.remove()
                if journal is None:
                    stack.callback(self._grams.remove)
            yield self._observed(how, journal, entry)
            self._ranks.barrier()
            if self._grams is not None:
                self._grams.remove()
            if journal is not None:
                journal.remove()

    def _agreed(self, recorded: dict[str, Any] | None) -> Holding:
        """How the model is held: as before where a run is resumed, else as the first rank says.

        Some ranks may have been killed before they wrote a journal; they do as the others did.
        """
        every = map(json.loads, self._ranks.texts(json.dumps(recorded)))
        recorded = next((one for one in every if one is not None), None)
        if recorded is not None:
            # What is not recorded is named when the journal is compared.
            before = recorded.get("batch sizes", [])
            sizes = before if self._run.batch_size is None else self._sizes()
            known = {"always": True, "never": False}
            stream = known.get(self._run.stream, recorded.get("streamed", False))
            return Holding(stream, recorded.get("offload", "device"), sizes)
        if self._run.device_map is not None:
            return Holding(False, "device", self._sizes())
        decision = decided(
            self._run,
            self.model,
            self.sources,
            self._place.parent,
            self._ranks,
            journal=self._journals,
            gram=self._gram,
        )
        if decision.stream:
            for reason in decision.reasons:
                self._heard.note(f"streaming: {reason}")
        sizes = [min(decision.batch_size, source.full_sequences) for source in self.sources]
        own = Holding(decision.stream, decision.offload or "device", sizes)
        return Holding(**json.loads(self._ranks.of_first(json.dumps(dataclasses.asdict(own)))))

    def _sizes(self) -> list[int]:
        """The batch size asked for, 1 where none was, at most the sequences there are."""
        return [min(self._run.batch_size or 1, source.full_sequences) for source in self.sources]

    def _observed(
        self, how: Holding, journal: Journal | None, entry: Entry | None
    ) -> Observed | None:
        """Loads the model and observes this rank's batches, from where a journal is; merges all."""
        model, world, heard = self.model, self._ranks, self._heard
        folds = self._options.folds
        packed = batches_of(model.config, model.layers, self.sources, how.batch_sizes, folds)
        batches = FoldedBatches(packed)
        before = 0.0 if entry is None else entry.seconds
        total = sum(source.tokens for source in self.sources) // world.size
        with (
            _listening(journal, heard) as stop,
            holding(
                model.path, self._run, how, self._place, heard, world, with_mtp=model.mtp
            ) as held,
        ):
            model.check_unchanged()  # the files that were loaded are those that were inspected
            grams, backend, fuse = self._grams, self._run.backend, self._options.fuse
            observer = observe(held.model, backend=backend, gram=grams is not None, fuse=fuse)
            self._prepare(observer, batches, how, entry)
            with heard.progress("observing", "tok", total) as progress:
                run = Run(
                    observer,
                    batches,
                    world.share(len(packed)),
                    stop,
                    self._journal_of(observer, journal, how),
                    done=lambda share: progress.add(share * total),
                    seconds=before,
                )
                steps = len(held.layers) if how.stream else len(run.numbers)
                progress.skip(run.start / max(1, steps) * total)
                self._go(run, observer, how, held, entry)
            if self._run.device_map is not None:  # what is on the disk may be read from these files
                model.check_unchanged()
            if journal is not None:  # what follows may fail, and then go on from here
                journal.write(steps, observer.snapshot(), seconds=run.clock())
            stats, seconds = observer.stats, run.clock()
        whole = world.merged(stats)
        if whole is not None:
            whole.provenance["run"] = self.asked
            whole.provenance["observed"] = {
                **hardware(self._run, world),
                "seconds": round(seconds, 3),
                "seed": self._data.seed,
            }
        if grams is not None:
            grams.finish(whole)
        if whole is None:
            return None
        return Observed(heard.notes, batches.merged(whole), seconds, gram=self._gram)

    def _journal_of(
        self, observer: Observer, journal: Journal | None, how: Holding
    ) -> ObserverJournal | None:
        """The journal of a run; of a resident model it has the Gram sums so far."""
        if journal is None:
            return None
        if self._grams is None or how.stream:
            return ObserverJournal(journal, observer)
        return ObserverJournal(journal, observer, lambda folder: save_grams(observer.grams, folder))

    def _prepare(
        self, observer: Observer, batches: FoldedBatches, how: Holding, entry: Entry | None
    ) -> None:
        """Every group exists on every rank, in one order."""
        if entry is not None:
            observer.restore(entry.snapshot)
        if entry is not None and self._grams is not None:
            if how.stream or entry.states is None:
                self._grams.check(entry.snapshot)
            else:
                observer.restore_grams(load_grams(entry.states))
        for group in batches.groups:
            with observer.group(group):
                observer.group_index()
        folds = batches.batches.folds
        for source, size in zip(self.sources, how.batch_sizes, strict=True):
            observer.add_source({**source.provenance(), "batch_size": size, "folds": folds})

    def _go(
        self, run: Run, observer: Observer, how: Holding, held: Held, entry: Entry | None
    ) -> None:
        """Runs, resident or streamed; Gram sums are written when they are complete."""
        if held.streamed is None:
            run_resident(run)
            if self._grams is not None:
                self._grams.put(observer.grams)
            return
        if self._grams is not None:
            run.layer_done = functools.partial(observer.give_grams, sink=self._grams.take)
        store = StateStore(how.offload, held.streamed.device, self._folder)
        try:
            if entry is not None and entry.states is not None:
                store.load(entry.states)
            run_streamed(run, held.streamed, store)
        finally:
            store.close()
            if run.journal is None:
                shutil.rmtree(self._folder, ignore_errors=True)


def journal_folder(out: Path, world: Ranks) -> Path:
    """Where the journal of an output is, beside it; each rank has its own."""
    rank = f"-{world.rank}-of-{world.size}" if world.size > 1 else ""
    return out.absolute().with_name(f"{out.absolute().name}.journal{rank}")


@contextlib.contextmanager
def _listening(journal: Journal | None, heard: Listener) -> Iterator[Stop]:
    """Defers Ctrl-C while a journal is written; without one, it ends the run at once."""
    if journal is None:
        yield Stop()
        return
    text = "writing the journal, then ending; press Ctrl-C again to end without"
    with deferred(lambda: heard.note(text)) as stop:
        yield stop
