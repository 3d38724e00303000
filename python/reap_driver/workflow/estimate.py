"""Estimating: what observing a model would take here, found without running it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reap_driver.base.units import clock, in_bytes, row, short
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.load.storage import check_storage
from reap_driver.memory.checkpoint_size import CheckpointSize, estimated, run_dtype, stored_files
from reap_driver.memory.decision import Decision, decide, resident, streamed
from reap_driver.memory.forecast import Forecast, forecast
from reap_driver.memory.machine import Machine, this_machine
from reap_driver.memory.model_sizes import ModelSizes, model_sizes
from reap_driver.memory.rates import Rates, measure
from reap_driver.memory.workload import Workload, workload
from reap_driver.model.discover import find_moe_layers, record_of
from reap_driver.workflow.calibration import group_lines, read_data
from reap_driver.workflow.inspection import Model, check_packing, device_of, sequence_length
from reap_driver.workflow.jobs import EstimateOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.results import Result
from reap_driver.workflow.sources import sources_of
from reap_kernels.errors import ReapError, UnsupportedModel

_GIGA = 10**9


@dataclass(frozen=True, repr=False)
class Estimate(Result):
    """What a run would take.

    Attributes:
        sizes: of the model in memory.
        stored: of its files.
        machine: what is free.
        work: what is to run.
        decision: how the model would be held.
        rates: measured here.
        forecast: seconds, at those rates.

    Example:
        >>> rd.estimate("MODEL", tokens=1000).decision.stream
        False
    """

    sizes: ModelSizes
    stored: CheckpointSize
    machine: Machine
    work: Workload
    decision: Decision
    rates: Rates
    forecast: Forecast

    def describe(self) -> str:
        """See `Result`."""
        return "\n".join(
            [
                *_model_lines(self.sizes, self.stored, self.work),
                *_need_lines(self.sizes, self.machine, self.work),
                *self.decision.lines(),
                *_time_lines(self.decision, self.forecast, self.rates),
            ]
        )

    def facts(self) -> dict[str, Any]:
        """See `Result`: bytes, seconds, operations."""
        sizes, stored, machine, work = self.sizes, self.stored, self.machine, self.work
        plan, rates, found = self.decision, self.rates, self.forecast
        device, host = machine.device_free, machine.host_free
        return {
            "dry_run": True,
            "model": {
                "architecture": sizes.architecture,
                "dtype": sizes.dtype,
                "parameters": sizes.parameters,
                "active_parameters": sizes.active_parameters,
                "layers": len(sizes.layer_bytes),
                "weight_bytes": sizes.weight_bytes,
                "rest_bytes": sizes.rest_bytes,
                "largest_layer_bytes": sizes.largest_layer,
                "largest_pair_bytes": sizes.largest_pair,
                "flops_per_token": sizes.flops_per_token,
            },
            "checkpoint": {
                "bytes": stored.nbytes,
                "origin": stored.origin,
                "format": stored.format,
            },
            "data": {
                "tokens": work.tokens,
                "seq_len": work.seq_len,
                "state_bytes": work.tokens * sizes.state_bytes,
            },
            "free": {
                "device": machine.device,
                "device_bytes": None if device is None else device.nbytes,
                "host_bytes": None if host is None else host.nbytes,
                "host_bound": None if host is None else host.bound,
                "disk_bytes": machine.disk_free,
            },
            "decision": plan.facts(),
            "rates": asdict(rates),
            "forecast": asdict(found),
        }


def estimate(options: EstimateOptions, listener: Listener | None = None) -> Estimate:
    """Decides as a real run would, with its arithmetic; see `reap_driver.estimate`.

    Raises:
        ResourceError: the model does not fit this machine; what it needs is reported before.
    """
    heard = Collector(listener)
    out = options.out
    device = device_of(options.run)
    sizes, stored, work = _inputs(options, heard)
    machine = this_machine(device, out.parent if isinstance(out, Path) else Path())
    for line in [*_model_lines(sizes, stored, work), *_need_lines(sizes, machine, work)]:
        heard.say(line)
    decision = decide(options.run.stream, sizes, machine, work)
    for line in decision.lines():
        heard.say(line)
    rates = measure(device, getattr(torch, sizes.dtype), stored.largest_file)
    found = forecast(decision, sizes, stored, work, rates)
    for line in _time_lines(decision, found, rates):
        heard.say(line)
    return Estimate(heard.notes, sizes, stored, machine, work, decision, rates, found)


def _inputs(
    options: EstimateOptions, heard: Listener
) -> tuple[ModelSizes, CheckpointSize, Workload]:
    """Sizes in memory and on disk, and the work."""
    path, run = str(options.model), options.run
    with _config_folder(path) as folder:
        config = load_config(folder, trust_remote_code=run.trust_remote_code)
        meta = meta_model(config)
        files = stored_files(Path(folder), config) if Path(folder).is_dir() else None
        check_storage(folder, config, None if files is None else files.tensors, meta)
    try:
        layers = find_moe_layers(meta)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from error
    model = Model(path, config, meta, layers, record_of(meta, layers, path))
    seq_len = sequence_length(model, options.data, run)
    check_packing(model, options.data)
    dtype = run_dtype(run.dtype, config, files)
    sizes = model_sizes(meta, layers, dtype=dtype, seq_len=seq_len)
    work = workload(
        meta,
        layers,
        tokens=_count_tokens(options, model, seq_len, heard),
        seq_len=seq_len,
        device=device_of(run),
        dtype=dtype,
        batch_size=run.batch_size,
    )
    return sizes, files or estimated(meta, config, dtype), work


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


def _count_tokens(options: EstimateOptions, model: Model, seq_len: int, heard: Listener) -> int:
    """The number given, or that of the data, which is read as in a real run."""
    if options.token_count is not None:
        return options.token_count
    wanted = sources_of(options.data)
    sources = read_data(model, wanted, options.data, options.run, seq_len, heard)
    for line in group_lines([source.provenance() for source in sources]):
        heard.say(line)
    return sum(source.tokens for source in sources)


def _need_lines(sizes: ModelSizes, machine: Machine, work: Workload) -> Iterator[str]:
    """What each way of holding the model needs at least, and what is free."""
    yield from _way_lines("resident", resident(sizes, machine, work, full=False))
    yield from _way_lines("streamed", streamed(sizes, machine, work, "file", full=False))
    yield from _machine_lines(machine)


def _model_lines(sizes: ModelSizes, stored: CheckpointSize, work: Workload) -> Iterator[str]:
    """The model and the data."""
    largest = in_bytes(sizes.largest_layer)
    origin = {"headers": "exact", "index": "as its index says", "estimated": "estimated"}
    yield row(
        "model",
        f"{sizes.architecture}: {short(sizes.parameters, 'kMBT')} parameters, "
        f"{short(sizes.active_parameters, 'kMBT')} active a token",
    )
    yield row("on disk", f"{in_bytes(stored.nbytes)} {stored.format} ({origin[stored.origin]})")
    yield row(
        f"in {sizes.dtype}",
        f"{in_bytes(sizes.weight_bytes)}: {len(sizes.layer_bytes)} decoder layers of up to "
        f"{largest}, the rest {in_bytes(sizes.rest_bytes)}",
    )
    yield row(
        "data",
        f"{work.tokens:,} tokens, sequences of {work.seq_len}; between two layers all their states "
        f"take {in_bytes(work.tokens * sizes.state_bytes)}",
    )


def _machine_lines(machine: Machine) -> Iterator[str]:
    """What is free."""
    said = []
    if machine.accelerated:
        free = machine.device_free
        said.append(f"{machine.device} {'unknown' if free is None else in_bytes(free.nbytes)}")
    free = machine.host_free
    said.append("host unknown" if free is None else f"host {in_bytes(free.nbytes)} {free.bound}")
    said.append(f"disk {in_bytes(machine.disk_free)} at {machine.disk}")
    yield row("free", "; ".join(said))


def _way_lines(name: str, plan: Decision) -> Iterator[str]:
    """What one way of holding the model needs, with the fewest sequences at a time."""
    for where, text in plan.needs():
        yield row(name, f"{where} {text}")
        name = ""


def _time_lines(plan: Decision, found: Forecast, rates: Rates) -> Iterator[str]:
    """The forecast, with what it rests on."""
    if rates.disk is not None and found.read_seconds is not None:
        rate = f"{in_bytes(int(rates.disk.per_second))}/s ({rates.disk.how})"
        yield row("read", f"{clock(found.read_seconds)}: {in_bytes(found.read_bytes)} at {rate}")
    else:
        pace = clock(found.read_bytes / _GIGA)
        yield row(
            "read",
            f"{pace} at 1 GB/s: {in_bytes(found.read_bytes)}; no weights here to measure with",
        )
    if rates.copy is not None and found.copy_seconds is not None:
        rate = f"{in_bytes(int(rates.copy.per_second))}/s ({rates.copy.how})"
        yield row("copy", f"{clock(found.copy_seconds)}: {in_bytes(found.copy_bytes)} at {rate}")
    if found.spill_bytes:
        pace = "" if found.spill_seconds is None else f"{clock(found.spill_seconds)}: "
        yield row("spill", f"{pace}{in_bytes(found.spill_bytes)}, were writing as fast as reading")
    yield row(
        "compute",
        f"{clock(found.compute_seconds)} at least: {short(found.flops)}FLOP at "
        f"{short(rates.matmul.per_second)}FLOP/s ({rates.matmul.how})",
    )
    if found.seconds is None:
        yield row("in all", "unknown without the weights: a disk's rate is measured on them")
    else:
        how = "reading while computing" if plan.stream else "loading, then computing"
        yield row("in all", f"{clock(found.seconds)} at least, {how}")
