"""How `observe` and `prune` run the model: held as decided, with a journal, on one rank or many."""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import reap_kernels
from reap_driver.base.interrupts import Stop, deferred
from reap_driver.cli.calibrate import Model, batches_of, device_of
from reap_driver.cli.console import Console
from reap_driver.cli.outputs import check_journal_folder
from reap_driver.data.folds import FoldedBatches
from reap_driver.data.packing import PackedSource
from reap_driver.files.digest import weights_digest
from reap_driver.load.resident import load_model
from reap_driver.load.streamed_model import StreamedModel, open_streamed
from reap_driver.memory.checkpoint_size import run_dtype, stored_files
from reap_driver.memory.decision import Decision, Offload, decide
from reap_driver.memory.machine import this_machine
from reap_driver.memory.model_sizes import ModelSizes, model_sizes
from reap_driver.memory.workload import Workload, workload
from reap_driver.observation import journal as journals
from reap_driver.observation.data_parallel import Ranks
from reap_driver.observation.journal import Entry, Journal
from reap_driver.observation.observer import Observer, observe
from reap_driver.observation.run import ObserverJournal, Run, run_resident, run_streamed
from reap_driver.observation.state_store import StateStore
from reap_driver.writer.staging import scratch
from reap_kernels import SaliencyStats
from reap_kernels.errors import CheckpointError, ResourceError


@dataclass(frozen=True)
class Observed:
    """Statistics of all ranks, and the seconds the first one ran, interrupted runs included."""

    stats: SaliencyStats
    seconds: float


@dataclass(frozen=True)
class How:
    """How the model is held, the same on every rank.

    Attributes:
        stream: whether decoder layers come one at a time.
        offload: where hidden states are stored between them.
        batch_sizes: sequences at a time, for each source.
    """

    stream: bool
    offload: Offload
    batch_sizes: list[int]


def check_journal(args: argparse.Namespace, ranks: Ranks) -> None:
    """What can be said of a journal before data is read.

    Raises:
        DataError: `--resume`, and there is none.
        CheckpointError: an interrupted run left one, and it is not said what to do with it; or its
            folder holds something else.
    """
    folder = journal_folder(args.out, ranks)
    check_journal_folder(folder)
    if args.resume:
        journals.read(folder)
    elif journals.exists(folder) and args.journal and not args.overwrite:
        raise CheckpointError(
            f"{folder}: the journal of a run that was interrupted; give --resume to go on from it, "
            "or --overwrite to start anew"
        )


def journal_folder(out: Path, ranks: Ranks) -> Path:
    """Where the journal of an output is, beside it; each rank has its own."""
    rank = f"-{ranks.rank}-of-{ranks.size}" if ranks.size > 1 else ""
    return out.absolute().with_name(f"{out.absolute().name}.journal{rank}")


@contextlib.contextmanager
def observed(
    args: argparse.Namespace,
    model: Model,
    sources: Sequence[PackedSource],
    console: Console,
    ranks: Ranks,
) -> Iterator[Observed | None]:
    """Runs the model on the data; the journal is deleted when the block ends without an error.

    Yields:
        What was observed; None on ranks other than the first, which have nothing to write.

    Raises:
        ResourceError: the model does not fit.
        Interrupted: on request; the text says how to go on.
        DataError: the journal is of another run; an expert gave NaN or Inf.
    """
    folder = journal_folder(args.out, ranks)
    with contextlib.ExitStack() as stack:
        if args.journal:
            stack.enter_context(journals.locked(folder))
        recorded = journals.read(folder)["run"] if args.resume else None
        how = _agreed(args, model, sources, ranks, recorded, console)
        journal = None
        if args.journal:
            run = identity(args, model, sources, how, ranks)
            journal = Journal(folder, run, args.journal_every)
        yield _run(args, model, sources, how, journal, ranks, console)
        ranks.barrier()
        if journal is not None:
            journal.remove()


def _agreed(
    args: argparse.Namespace,
    model: Model,
    sources: Sequence[PackedSource],
    ranks: Ranks,
    recorded: dict[str, Any] | None,
    console: Console,
) -> How:
    """How the model is held: as before where a run is resumed, else as the first rank decides."""
    if recorded is not None:
        # What is not recorded is named when the journal is compared.
        before = recorded.get("batch sizes", [])
        sizes = before if args.batch_size is None else _sizes(args, sources)
        stream = {"always": True, "never": False}.get(args.stream, recorded.get("streamed", False))
        return How(stream, recorded.get("offload", "device"), sizes)
    if args.device_map is not None:
        return How(False, "device", _sizes(args, sources))
    decision = decided(args, model, sources, ranks)
    if decision.stream:
        for reason in decision.reasons:
            console.note(f"streaming: {reason}")
    sizes = [min(decision.batch_size, source.full_sequences) for source in sources]
    own = How(decision.stream, decision.offload or "device", sizes)
    return How(**json.loads(ranks.of_first(json.dumps(dataclasses.asdict(own)))))


def _sizes(args: argparse.Namespace, sources: Sequence[PackedSource]) -> list[int]:
    """The batch size that was asked for, 1 where none was, at most the sequences there are."""
    return [min(args.batch_size or 1, source.full_sequences) for source in sources]


def decided(
    args: argparse.Namespace,
    model: Model,
    sources: Sequence[PackedSource],
    ranks: Ranks,
    *,
    all_logits: bool = False,
) -> Decision:
    """How the model is best held on this machine, and how many sequences run at a time.

    Args:
        all_logits: whether the logits of every token are wanted.

    Raises:
        ResourceError: it does not fit as wanted.
    """
    device = device_of(args, ranks)
    sizes, work = sized(args, model, sources, device, share=ranks.size, all_logits=all_logits)
    machine = this_machine(device, args.out.absolute().parent).shared(ranks.local_size)
    decision = decide(args.stream, sizes, machine, work)
    states = work.tokens * sizes.state_bytes
    if decision.stream and args.journal and 2 * states > machine.disk_free:
        raise ResourceError(
            f"{args.out.absolute().parent}: the journal needs {2 * states} bytes for the states "
            f"between two layers, {machine.disk_free} are free; free some space, choose an output "
            "on another disk, or pass --no-journal"
        )
    return decision


def sized(
    args: argparse.Namespace,
    model: Model,
    sources: Sequence[PackedSource],
    device: torch.device,
    *,
    share: int = 1,
    all_logits: bool = False,
) -> tuple[ModelSizes, Workload]:
    """What a model takes in memory, and what is to run.

    Args:
        sources: the data.
        device: where it runs.
        share: processes that share the data.
        all_logits: whether the logits of every token are wanted.
    """
    files = stored_files(model.source.folder, model.config)
    dtype = run_dtype(args.dtype, model.config, files)
    seq_len, tokens = sources[0].seq_len, sum(source.tokens for source in sources)
    sizes = model_sizes(model.meta, model.layers, dtype=dtype, seq_len=seq_len)
    work = workload(
        model.meta,
        model.layers,
        tokens=-(-tokens // share),
        seq_len=seq_len,
        device=device,
        dtype=dtype,
        batch_size=args.batch_size,
        all_logits=all_logits,
    )
    return sizes, work


def identity(
    args: argparse.Namespace,
    model: Model,
    sources: Sequence[PackedSource],
    how: How,
    ranks: Ranks,
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
        "packing": args.packing,
        "seq_len": sources[0].seq_len,
        "seed": args.seed,
        "answers only": args.answers_only,
        "folds": args.folds,
        "batch sizes": how.batch_sizes,
        "dtype": args.dtype,
        "streamed": how.stream,
        "offload": how.offload,
        "device": _device_name(args, ranks),
        "backend": args.backend,
        "rank": f"{ranks.rank} of {ranks.size}",
        "reap_kernels": reap_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("REAP_")},
    }


def _device_name(args: argparse.Namespace, ranks: Ranks) -> str:
    """The kind of device: another kind, or another number of threads, may round otherwise."""
    if args.device_map is not None:
        return f"map {args.device_map}"
    device = device_of(args, ranks)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{device.type} {capability}, {threads} threads"


def _run(
    args: argparse.Namespace,
    model: Model,
    sources: Sequence[PackedSource],
    how: How,
    journal: Journal | None,
    ranks: Ranks,
    console: Console,
) -> Observed | None:
    """Loads the model and observes this rank's batches, from where a journal is; merges all."""
    entry = None
    if journal is not None and args.resume:
        entry = journal.resume()  # before anything else: it may be of another run
    elif journal is not None:
        journal.remove()  # of a run that is started anew, by --overwrite
    packed = batches_of(model.config, model.layers, sources, how.batch_sizes, args.folds)
    batches = FoldedBatches(packed)
    before = 0.0 if entry is None else entry.seconds
    total = sum(source.tokens for source in sources) // ranks.size
    with _listening(journal, console) as stop, holding(args, how, ranks, console) as held:
        model.check_unchanged()  # the files that were loaded are those that were inspected
        observer = observe(held.model, backend=args.backend)
        _prepare(observer, sources, batches, how, entry)
        with console.progress("observing", "tok", total) as progress:
            run = Run(
                observer,
                batches,
                ranks.share(len(packed)),
                stop,
                None if journal is None else ObserverJournal(journal, observer),
                done=lambda share: progress.add(share * total),
                seconds=before,
            )
            steps = len(held.layers) if how.stream else len(run.numbers)
            progress.skip(run.start / max(1, steps) * total)
            _observe(run, how, held, entry, journal_folder(args.out, ranks))
        if args.device_map is not None:  # what it puts on the disk may be read from these files
            model.check_unchanged()
        if journal is not None:  # what follows may fail, and then go on from here
            journal.write(steps, observer.snapshot(), seconds=run.clock())
        stats, seconds = observer.stats, run.clock()
    whole = ranks.merged(stats)
    return None if whole is None else Observed(batches.merged(whole), seconds)


@dataclass(frozen=True)
class Held:
    """A model that is loaded, and how its layers come if they are streamed."""

    model: PreTrainedModel
    streamed: StreamedModel | None = None

    @property
    def layers(self) -> Sequence[Any]:
        """Its decoder layers where they are streamed."""
        return () if self.streamed is None else self.streamed.text_layers


@contextlib.contextmanager
def holding(args: argparse.Namespace, how: How, ranks: Ranks, console: Console) -> Iterator[Held]:
    """The model, held as decided."""
    if not how.stream:
        with in_memory(args, args.model, args.out.absolute(), console, ranks) as model:
            yield Held(model)
        return
    device = device_of(args, ranks)
    with open_streamed(args.model, device=device, **load_options(args)) as streamed:
        yield Held(streamed.model, streamed)


@contextlib.contextmanager
def in_memory(
    args: argparse.Namespace, path: str, beside: Path, console: Console, ranks: Ranks | None = None
) -> Iterator[PreTrainedModel]:
    """A model loaded whole, on one device or as --device-map spreads it.

    Args:
        path: folder or hub id of the model.
        beside: where a folder is made for what the map puts on the disk.
    """
    options = load_options(args)
    if args.device_map is None:
        yield load_model(path, device=device_of(args, ranks), **options)
        return
    with scratch(beside) as folder, console.library_progress():
        yield load_model(path, device_map=args.device_map, offload_folder=folder, **options)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of loading, however a model is held."""
    return {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}


def _prepare(
    observer: Observer,
    sources: Sequence[PackedSource],
    batches: FoldedBatches,
    how: How,
    entry: Entry | None,
) -> None:
    """Every group exists on every rank, in one order."""
    if entry is not None:
        observer.restore(entry.snapshot)
    for group in batches.groups:
        with observer.group(group):
            observer.group_index()
    folds = batches.batches.folds
    for source, size in zip(sources, how.batch_sizes, strict=True):
        observer.add_source({**source.provenance(), "batch_size": size, "folds": folds})


def _observe(run: Run, how: How, held: Held, entry: Entry | None, folder: Path) -> None:
    """Runs, resident or streamed."""
    if held.streamed is None:
        run_resident(run)
        return
    store = StateStore(how.offload, held.streamed.device, folder)
    try:
        if entry is not None and entry.states is not None:
            store.load(entry.states)
        run_streamed(run, held.streamed, store)
    finally:
        store.close()
        if run.journal is None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _listening(journal: Journal | None, console: Console) -> Iterator[Stop]:
    """Hears requests to end where a journal can be written; elsewhere they end the run at once."""
    if journal is None:
        yield Stop()
        return
    text = "writing the journal, then ending; press Ctrl-C again to end without"
    with deferred(lambda: console.note(text)) as stop:
        yield stop
