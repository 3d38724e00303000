"""Estimating: what observing a model would take, here or elsewhere, found without running it."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reap_driver.compat.config_file import read_config
from reap_driver.compat.library_faults import check_runs
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.quantization import quantization_in
from reap_driver.load.storage import check_storage
from reap_driver.memory.checkpoint_size import CheckpointSize, estimated, run_dtype, stored_files
from reap_driver.memory.decision import Decision, decide
from reap_driver.memory.forecast import Forecast, forecast
from reap_driver.memory.machine import Machine, planned_machine, this_machine
from reap_driver.memory.model_sizes import ModelSizes, model_sizes
from reap_driver.memory.rates import Rates, given_rates, measure
from reap_driver.memory.workload import Workload, gram_file_bytes, workload
from reap_driver.model.discover import find_moe_layers, record_of
from reap_driver.observation.gram_sums import check_gram
from reap_driver.workflow import estimate_rows as rows
from reap_driver.workflow.calibration import group_lines, read_data
from reap_driver.workflow.inspection import (
    Model,
    check_packing,
    device_of,
    planned_length,
    sequence_length,
)
from reap_driver.workflow.jobs import EstimateOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.mtp_choice import with_mtp_choice
from reap_driver.workflow.results import Result
from reap_driver.workflow.sizes import Leaves, Sizing, leaves_of
from reap_driver.workflow.sources import sources_of
from reap_kernels.errors import DataError, ReapError, UnsupportedModel


@dataclass(frozen=True, repr=False)
class Estimate(Result):
    """What a run would take.

    Attributes:
        lines: the arithmetic, as the command line prints it.
        known: the same as JSON values: bytes, seconds, operations.
        sizes: of the model in memory.
        stored: of its files.
        machine: what is free, for one of its ranks.
        work: what is to run, on one rank.
        decision: how the model would be held.
        rates: measured here, or given.
        forecast: seconds, at those rates.
        leaves: what pruning leaves; None where no amount to remove is given.

    Example:
        >>> rd.estimate("MODEL", tokens=1000).decision.stream
        False
    """

    lines: tuple[str, ...]
    known: dict[str, Any]
    sizes: ModelSizes
    stored: CheckpointSize
    machine: Machine
    work: Workload
    decision: Decision
    rates: Rates
    forecast: Forecast
    leaves: Leaves | None

    def describe(self) -> str:
        """See `Result`."""
        return "\n".join(self.lines)

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        return self.known


def estimate(
    options: EstimateOptions, listener: Listener | None = None, *, pruning: bool = True
) -> Estimate:
    """Decides as a real run would, with its arithmetic; see `reap_driver.estimate`.

    Args:
        options: of the run.
        listener: hears the rows.
        pruning: say what pruning leaves, where an amount to remove is given.

    Raises:
        ReapError: the model does not fit, or it or its data cannot be read. What is known by then
            is reported before, and is the error's `known`.
    """
    job = _Estimating(options, Collector(listener), pruning=pruning)
    try:
        with _config_folder(str(options.model)) as folder:
            return job.run(folder)
    except ReapError as error:
        error.known = job.known
        raise


class _Estimating:
    """One estimate: what is found is reported as soon as it is, and kept.

    An input that cannot be read ends it only when all that does not depend on it has been reported.

    Args:
        options: those of the job.
        heard: hears the rows.
        pruning: see `estimate`.
    """

    def __init__(self, options: EstimateOptions, heard: Collector, *, pruning: bool) -> None:
        self._options, self._heard = options, heard
        shaped = options.shape.shape is not None
        self._pruning = pruning and (options.rank.given or shaped)
        self._gram = options.gram is not None or (pruning and shaped)
        self._given = options.given_machine
        self._failed: list[ReapError] = []
        self._lines: list[str] = []
        self.known: dict[str, Any] = {"dry_run": True, "machine": options.machine}

    def run(self, folder: str) -> Estimate:
        """All steps, for the model in `folder`."""
        device, machine = self._machine()
        model, seq_len = self._model(folder)
        stored, dtype = self._storage(folder, model)
        if dtype is None:
            raise self._failed[0]
        model = self._observed(model, stored)
        meta, layers = model.observed
        sizes = model_sizes(meta, layers, dtype=dtype, seq_len=seq_len)
        self._add(rows.model(sizes), model=rows.model_facts(sizes))
        if stored is not None:
            self._add(rows.stored(stored), checkpoint=rows.stored_facts(stored))
        tokens = self._tokens(model, seq_len)
        work = workload(
            meta,
            layers,
            tokens=seq_len if tokens is None else -(-tokens // machine.ranks),
            seq_len=seq_len,
            device=device,
            dtype=dtype,
            batch_size=self._options.run.batch_size,
            gram=self._gram,
        )
        if self._gram:
            check_gram(model.layers)
            disk = sum(gram_file_bytes(model.layers))
            self._add(rows.grams(work, disk), gram=rows.gram_facts(work, disk))
        if tokens is not None:
            facts = rows.data_facts(tokens, sizes, work)
            self._add(rows.data(tokens, sizes, work, machine), data=facts)
        else:
            self._add(rows.no_data(sizes, work))
        self._add(rows.needs(sizes, machine, work), needs=rows.needs_facts(sizes, machine, work))
        self._add(rows.free(machine), free=rows.free_facts(machine))
        leaves = self._leaves(folder, model, stored, machine)
        if self._failed or stored is None:
            raise self._failed[0]
        decision = decide(self._options.run.stream, sizes, machine, work)
        self._add(decision.lines(), decision=decision.facts())
        rates, found = self._times(decision, sizes, stored, work, machine, device, dtype)
        notes, lines = self._heard.notes, tuple(self._lines)
        return Estimate(
            notes, lines, self.known, sizes, stored, machine, work, decision, rates, found, leaves
        )

    def _machine(self) -> tuple[torch.device, Machine]:
        """The device, and what is free: as described, without a look at this machine, or here."""
        if self._given is not None:
            return torch.device(self._given.kind), planned_machine(self._given)
        try:
            device = device_of(self._options.run)
        except DataError as error:
            raise DataError(
                f"{error}; `machine` plans for a machine that is not this one"
            ) from error
        out = self._options.out
        return device, this_machine(device, out.parent if isinstance(out, Path) else Path())

    def _model(self, folder: str) -> tuple[Model, int]:
        """The model by its configuration, and the length of sequences."""
        path, run, data = str(self._options.model), self._options.run, self._options.data
        config = load_config(folder, trust_remote_code=run.trust_remote_code)
        meta = meta_model(config)
        check_runs(path, type(meta))
        try:
            layers = find_moe_layers(meta)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{path}: {error}") from error
        model = Model(path, config, meta, layers, record_of(meta, layers, path))
        if self._given is not None:  # whether a backend runs there is not known
            return model, planned_length(model, data)
        return model, sequence_length(model, data, run)

    def _observed(self, model: Model, stored: CheckpointSize | None) -> Model:
        """The model, with its choice whether its multi-token-prediction layer is observed."""
        options = self._options
        if not (self._pruning or options.with_mtp):
            return model
        keys = None if stored is None else stored.tensors
        return with_mtp_choice(model, options, keys, self._heard)

    def _storage(
        self, folder: str, model: Model
    ) -> tuple[CheckpointSize | None, torch.dtype | None]:
        """The size of the files, and the dtype in memory; None where they cannot be known."""
        config, files, size, dtype = model.config, None, None, None
        with _later(self._failed):
            files = stored_files(Path(folder), config) if Path(folder).is_dir() else None
            size = files
        with _later(self._failed):
            dtype = run_dtype(self._options.run.dtype, config, files)
            if not self._failed:
                tensors = None if files is None else files.tensors
                quantization = quantization_in(Path(folder), read_config(folder))
                check_storage(folder, config, quantization, tensors, model.meta)
                size = files or estimated(model.meta, config, dtype)
        return size, dtype

    def _tokens(self, model: Model, seq_len: int) -> int | None:
        """The number given, or that of the data, which is read as in a real run; None if the model
        or the data cannot be read.
        """
        options = self._options
        with _later(self._failed):
            check_packing(model, options.data)
        if options.token_count is not None or self._failed:
            return options.token_count
        with _later(self._failed):
            wanted = sources_of(options, self._heard)
            sources = read_data(model, wanted, options.data, options.run, seq_len, self._heard)
            self._add(group_lines([source.provenance() for source in sources]))
            return sum(source.tokens for source in sources)
        return None

    def _leaves(
        self, folder: str, model: Model, stored: CheckpointSize | None, machine: Machine
    ) -> Leaves | None:
        """What pruning leaves, where an amount to remove is given and the files can be sized."""
        options = self._options
        if not self._pruning or stored is None:
            return None
        with _later(self._failed):
            files = None if stored.origin == "estimated" else stored
            run, write = options.run, options.write
            trust = run.trust_remote_code
            sizing = Sizing(model, folder, files, write, dtype=run.dtype, trust=trust)
            leaves = leaves_of(options, sizing, self._heard)
            self._add(rows.pruned(leaves, machine), pruned=leaves.facts())
            return leaves
        return None

    def _times(
        self,
        decision: Decision,
        sizes: ModelSizes,
        stored: CheckpointSize,
        work: Workload,
        machine: Machine,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Rates, Forecast]:
        """The rates, measured here unless they were given, and the time at those rates."""
        given = self._given
        rates = given_rates(given) if given else measure(device, dtype, stored.largest_file)
        found = forecast(decision, sizes, stored, work, rates, machine.ranks)
        lines = rows.times(decision, found, rates, machine.ranks)
        self._add(lines, rates=asdict(rates), forecast=asdict(found))
        return rates, found

    def _add(self, lines: Iterable[str], **known: Any) -> None:
        """Reports rows, and keeps them and their facts."""
        for line in lines:
            self._heard.say(line)
            self._lines.append(line)
        self.known |= known


@contextmanager
def _later(failed: list[ReapError]) -> Iterator[None]:
    """Keeps an error for later."""
    try:
        yield
    except ReapError as error:
        failed.append(error)


@contextmanager
def _config_folder(model: str) -> Iterator[str]:
    """A folder for MODEL: itself, that of its config.json, or one made for another .json file."""
    file = Path(model)
    if file.suffix != ".json" or not file.is_file():
        yield model
    elif file.name == "config.json":
        yield str(file.parent)
    else:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(file, Path(folder) / "config.json")
            try:
                yield folder
            except ReapError as error:  # what is wrong is in the file that was named
                text = str(error).replace(f"{folder}/config.json", model).replace(folder, model)
                raise type(error)(text) from error
