"""How jobs hold a model: whole or streamed, as memory decides, and with which batch size."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from reap_driver.base.units import in_bytes
from reap_driver.data.packing import PackedSource
from reap_driver.load.resident import load_model
from reap_driver.load.streamed_model import StreamedModel, open_streamed
from reap_driver.memory.checkpoint_size import run_dtype, stored_files
from reap_driver.memory.decision import Decision, Offload, decide
from reap_driver.memory.machine import free_disk, this_machine
from reap_driver.memory.model_sizes import ModelSizes, model_sizes
from reap_driver.memory.workload import Workload, gram_file_bytes, workload
from reap_driver.observation.data_parallel import Ranks
from reap_driver.workflow.inspection import Model, device_of
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.options import RunOptions
from reap_driver.writer.staging import scratch
from reap_kernels.errors import ResourceError


@dataclass(frozen=True)
class Holding:
    """How a model is held, the same on every rank.

    Attributes:
        stream: whether decoder layers come one at a time.
        offload: where hidden states are stored between them.
        batch_sizes: sequences at a time, for each source.
    """

    stream: bool
    offload: Offload
    batch_sizes: list[int]


@dataclass(frozen=True)
class Held:
    """A model that is loaded, and how its layers come if they are streamed."""

    model: PreTrainedModel
    streamed: StreamedModel | None = None

    @property
    def layers(self) -> Sequence[Any]:
        """Its decoder layers where they are streamed."""
        return () if self.streamed is None else self.streamed.text_layers


def decided(
    run: RunOptions,
    model: Model,
    sources: Sequence[PackedSource],
    beside: Path,
    ranks: Ranks | None = None,
    *,
    journal: bool = False,
    all_logits: bool = False,
    gram: Path | None = None,
) -> Decision:
    """How a model is best held on this machine, and how many sequences run at a time.

    Args:
        run: the options.
        model: what is known of it.
        sources: the data.
        beside: folder whose disk takes what memory cannot.
        ranks: processes that share the data.
        journal: whether states are kept twice on that disk, for a journal.
        all_logits: whether the logits of every token are wanted.
        gram: the folder of Gram matrices; None if none are summed.

    Raises:
        ResourceError: it does not fit as wanted.
    """
    world = ranks or Ranks()
    device = device_of(run, ranks)
    sizes, work = sized(
        run,
        model,
        sources,
        device,
        share=world.size,
        all_logits=all_logits,
        gram=gram is not None,
    )
    machine = this_machine(device, beside).shared(world.local_size)
    decision = decide(run.stream, sizes, machine, work)
    states = work.tokens * sizes.state_bytes
    free = machine.disk_free
    if decision.stream and journal and free is not None and 2 * states > free.nbytes:
        raise ResourceError(
            f"{beside}: the journal needs {2 * states} bytes for the states between two layers, "
            f"{free.nbytes} are free; free some space, choose an output on another disk, or "
            "pass `journal=False`"
        )
    if gram is not None:
        _check_gram_disk(gram, model, world, copies=2 if journal and not decision.stream else 0)
    return decision


def _check_gram_disk(gram: Path, model: Model, world: Ranks, copies: int) -> None:
    """Refuses a disk on which the Gram matrices do not fit.

    Args:
        gram: their folder.
        model: what is known of it.
        world: each rank writes its own, and they are added up in one more.
        copies: of those so far, in the journal of a resident model.
    """
    once = sum(gram_file_bytes(model.layers))
    need = once * (1 + copies) * world.local_size + (once if world.size > 1 else 0)
    free = free_disk(gram.parent)
    if need > free.nbytes:
        raise ResourceError(
            f"{gram}: the Gram matrices need {in_bytes(need)} on this disk, "
            f"{in_bytes(free.nbytes)} are free; free some space, or choose a folder on another "
            "disk" + (", or `stream='always'`, which keeps one copy only" if copies else "")
        )


def sized(
    run: RunOptions,
    model: Model,
    sources: Sequence[PackedSource],
    device: torch.device,
    *,
    share: int = 1,
    all_logits: bool = False,
    gram: bool = False,
) -> tuple[ModelSizes, Workload]:
    """What a model takes in memory, and what is to run.

    Args:
        run: the options.
        model: what is known of it.
        sources: the data.
        device: where it runs.
        share: processes that share the data.
        all_logits: whether the logits of every token are wanted.
        gram: whether Gram matrices are summed.
    """
    files = stored_files(model.source.folder, model.config)
    dtype = run_dtype(run.dtype, model.config, files)
    seq_len, tokens = sources[0].seq_len, sum(source.tokens for source in sources)
    meta, layers = model.observed
    sizes = model_sizes(meta, layers, dtype=dtype, seq_len=seq_len)
    work = workload(
        meta,
        layers,
        tokens=-(-tokens // share),
        seq_len=seq_len,
        device=device,
        dtype=dtype,
        batch_size=run.batch_size,
        all_logits=all_logits,
        gram=gram,
    )
    return sizes, work


@contextlib.contextmanager
def holding(
    path: str,
    run: RunOptions,
    how: Holding,
    beside: Path,
    listener: Listener,
    ranks: Ranks | None = None,
    *,
    with_mtp: bool = False,
) -> Iterator[Held]:
    """A model, held as decided; with its multi-token-prediction layer, where asked for."""
    if not how.stream:
        with in_memory(path, run, beside, listener, ranks, with_mtp=with_mtp) as model:
            yield Held(model)
        return
    device = device_of(run, ranks)
    with open_streamed(path, device=device, with_mtp=with_mtp, **load_options(run)) as streamed:
        yield Held(streamed.model, streamed)


@contextlib.contextmanager
def in_memory(
    path: str,
    run: RunOptions,
    beside: Path,
    listener: Listener,
    ranks: Ranks | None = None,
    *,
    with_mtp: bool = False,
) -> Iterator[PreTrainedModel]:
    """A model loaded whole, on one device or spread by a device map.

    Args:
        path: folder or hub id of the model.
        run: the options.
        beside: where a folder is made for what the map puts on the disk.
        listener: hears of loading.
        ranks: of which each has a device of its own.
        with_mtp: with its multi-token-prediction layer.
    """
    options = {**load_options(run), "with_mtp": with_mtp}
    if run.device_map is None:
        yield load_model(path, device=device_of(run, ranks), **options)
        return
    with scratch(beside) as folder, listener.library_progress():
        yield load_model(path, device_map=run.device_map, offload_folder=folder, **options)


def load_options(run: RunOptions) -> dict[str, Any]:
    """Arguments of loading, however a model is held."""
    return {"dtype": run.dtype, "trust_remote_code": run.trust_remote_code}
