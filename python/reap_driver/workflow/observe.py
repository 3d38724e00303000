"""Observing: runs a model on data, held as decided, with a journal, on one rank or many."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import reap_kernels
from reap_driver.base.interrupts import Stop, deferred
from reap_driver.base.units import short, took
from reap_driver.data.folds import FoldedBatches
from reap_driver.data.packing import PackedSource
from reap_driver.files.digest import weights_digest
from reap_driver.observation import journal as journals
from reap_driver.observation.data_parallel import Ranks, ranks
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
from reap_driver.workflow.holding import Held, Holding, decided, holding
from reap_driver.workflow.inspection import (
    Model,
    check_packing,
    device_of,
    inspect_model,
    sequence_length,
)
from reap_driver.workflow.jobs import ObserveOptions, PruneOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.options import DataOptions, RunOptions
from reap_driver.workflow.outputs import check_file, check_journal_folder, inputs_of
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

    Example:
        >>> observed = rd.observe_data("MODEL", "code.jsonl:40", seq_len=64)
        >>> observed.stats.groups
        ['code']
    """

    stats: SaliencyStats
    seconds: float
    out: Path | None = None

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        sources = self.stats.provenance["data"]
        layers = self.stats.layers.values()
        out = {} if self.out is None else {"out": str(self.out)}
        return {
            **out,
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
            f"({short(self.tokens / self.seconds)} tokens/s); {facts['experts_never_routed']} of "
            f"{facts['experts']} experts were never routed to"
        )
        return "\n".join([text, *group_lines(facts["data"])])


def observe_data(options: ObserveOptions, listener: Listener | None = None) -> Observed | None:
    """Observes a model on data and saves the statistics; what can be checked early is.

    Returns:
        What was observed; None on ranks other than the first, which have nothing to write.
    """
    heard = Collector(listener)
    out = options.out
    with ranks() as world, contextlib.ExitStack() as stack:
        heard.only(world.rank == 0)
        if isinstance(out, Path):
            check_file(out, overwrite=options.overwrite, inputs=inputs_of(options, out))
            place = out.absolute()
        else:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reap-")), "stats")
        job = Observing(options, place, world, heard)
        job.check_journal()
        job.inspect()
        job.model.check_files()
        job.read_data()
        with job.observed() as found:
            if found is None:
                return None
            if isinstance(out, Path):
                found.stats.save(out)
                found = dataclasses.replace(found, out=out)
    heard.say(found.describe())
    return found


class Observing:
    """One observation, of `observe_data` or `prune`.

    Args:
        options: the options of the job.
        place: the output, beside which the journal and what memory cannot hold are.
        world: the processes that observe together.
        heard: receives notes and progress.

    Attributes:
        wanted: the sources that are named.
        model: what is known of the model, once `inspect` was called.
        sources: the data, once `read_data` was called.
    """

    def __init__(
        self, options: ObserveOptions | PruneOptions, place: Path, world: Ranks, heard: Collector
    ) -> None:
        self._options, self._place, self._ranks, self._heard = options, place, world, heard
        self._run: RunOptions = options.run
        self._data: DataOptions = options.data
        self._journals = options.journal.journal and options.out is not None
        self._folder = journal_folder(place, world)
        self.wanted = sources_of(self._data)
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
        if self._options.journal.resume:
            journals.read(self._folder)
        elif journals.exists(self._folder) and self._journals and not self._options.overwrite:
            raise CheckpointError(
                f"{self._folder}: the journal of a run that was interrupted; give `resume=True` to "
                "go on from it, or `overwrite=True` to start anew"
            )

    def inspect(self) -> None:
        """Finds the model's layers; no weights are read."""
        trust = self._run.trust_remote_code
        self.model = inspect_model(str(self._options.model), trust_remote_code=trust)

    def read_data(self) -> None:
        """Reads, tokenizes and packs the data, in sequences that the model can read."""
        seq_len = sequence_length(self.model, self._data, self._run)
        check_packing(self.model, self._data)
        self.sources = read_data(
            self.model, self.wanted, self._data, self._run, seq_len, self._heard
        )

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
        resume = self._options.journal.resume
        with contextlib.ExitStack() as stack:
            if self._journals:
                stack.enter_context(journals.locked(self._folder))
            recorded = journals.read(self._folder)["run"] if resume else None
            how = self._agreed(recorded)
            journal = None
            if self._journals:
                folds = self._options.folds
                run = identity(
                    self.model, self.sources, self._data, self._run, how, folds, self._ranks
                )
                journal = Journal(self._folder, run, self._options.journal.journal_every)
            yield self._observed(how, journal)
            self._ranks.barrier()
            if journal is not None:
                journal.remove()

    def _agreed(self, recorded: dict[str, Any] | None) -> Holding:
        """How the model is held: as before where a run is resumed, else as the first rank says."""
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

    def _observed(self, how: Holding, journal: Journal | None) -> Observed | None:
        """Loads the model and observes this rank's batches, from where a journal is; merges all."""
        entry = None
        if journal is not None and self._options.journal.resume:
            entry = journal.resume()  # before anything else: it may be of another run
        elif journal is not None:
            journal.remove()  # of a run that is started anew
        model, world, heard = self.model, self._ranks, self._heard
        folds = self._options.folds
        packed = batches_of(model.config, model.layers, self.sources, how.batch_sizes, folds)
        batches = FoldedBatches(packed)
        before = 0.0 if entry is None else entry.seconds
        total = sum(source.tokens for source in self.sources) // world.size
        with (
            _listening(journal, heard) as stop,
            holding(model.path, self._run, how, self._place, heard, world) as held,
        ):
            model.check_unchanged()  # the files that were loaded are those that were inspected
            observer = observe(held.model, backend=self._run.backend)
            self._prepare(observer, batches, how, entry)
            with heard.progress("observing", "tok", total) as progress:
                run = Run(
                    observer,
                    batches,
                    world.share(len(packed)),
                    stop,
                    None if journal is None else ObserverJournal(journal, observer),
                    done=lambda share: progress.add(share * total),
                    seconds=before,
                )
                steps = len(held.layers) if how.stream else len(run.numbers)
                progress.skip(run.start / max(1, steps) * total)
                self._go(run, how, held, entry)
            if self._run.device_map is not None:  # what is on the disk may be read from these files
                model.check_unchanged()
            if journal is not None:  # what follows may fail, and then go on from here
                journal.write(steps, observer.snapshot(), seconds=run.clock())
            stats, seconds = observer.stats, run.clock()
        whole = world.merged(stats)
        return None if whole is None else Observed(heard.notes, batches.merged(whole), seconds)

    def _prepare(
        self, observer: Observer, batches: FoldedBatches, how: Holding, entry: Entry | None
    ) -> None:
        """Every group exists on every rank, in one order."""
        if entry is not None:
            observer.restore(entry.snapshot)
        for group in batches.groups:
            with observer.group(group):
                observer.group_index()
        folds = batches.batches.folds
        for source, size in zip(self.sources, how.batch_sizes, strict=True):
            observer.add_source({**source.provenance(), "batch_size": size, "folds": folds})

    def _go(self, run: Run, how: Holding, held: Held, entry: Entry | None) -> None:
        """Runs, resident or streamed."""
        if held.streamed is None:
            run_resident(run)
            return
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


def identity(
    model: Model,
    sources: Sequence[PackedSource],
    options: DataOptions,
    run: RunOptions,
    how: Holding,
    folds: int,
    world: Ranks,
) -> dict[str, Any]:
    """What must be the same for a run to go on with the same bits."""
    data = {}
    for number, source in enumerate(sources, 1):
        facts = source.provenance()
        data[f"data {number}"] = f"{facts['group']}: {facts['tokens']} tokens {facts['digest']}"
    return {
        "model": model.provenance["model"]["config_digest"],
        "weights": weights_digest(model.source),
        **data,
        "packing": options.packing,
        "seq_len": sources[0].seq_len,
        "seed": options.seed,
        "answers only": options.answers_only,
        "chat template": sources[0].chat_template,
        "folds": folds,
        "batch sizes": how.batch_sizes,
        "dtype": run.dtype,
        "streamed": how.stream,
        "offload": how.offload,
        "device": _device_name(run, world),
        "backend": run.backend,
        "rank": f"{world.rank} of {world.size}",
        "reap_kernels": reap_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("REAP_")},
    }


def _device_name(run: RunOptions, world: Ranks) -> str:
    """The kind of device: another kind, or another number of threads, may round otherwise."""
    if run.device_map is not None:
        return f"map {run.device_map}"
    device = device_of(run, world)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{device.type} {capability}, {threads} threads"


@contextlib.contextmanager
def _listening(journal: Journal | None, heard: Listener) -> Iterator[Stop]:
    """Defers Ctrl-C while a journal is written; without one, it ends the run at once."""
    if journal is None:
        yield Stop()
        return
    text = "writing the journal, then ending; press Ctrl-C again to end without"
    with deferred(lambda: heard.note(text)) as stop:
        yield stop
