"""`--dry-run` of observe and prune: what a run would take here, without running it."""

import argparse
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.base.units import in_bytes, row, short
from reap_driver.cli.console import Console, clock

if TYPE_CHECKING:  # they import torch, and --help must not
    from transformers import PretrainedConfig

    from reap_driver.memory.checkpoint_size import CheckpointSize
    from reap_driver.memory.decision import Decision
    from reap_driver.memory.forecast import Forecast
    from reap_driver.memory.machine import Machine
    from reap_driver.memory.model_sizes import ModelSizes
    from reap_driver.memory.rates import Rates
    from reap_driver.memory.workload import Workload

_GIGA = 10**9


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Decides as the real run would, prints the arithmetic, and writes no output.

    Raises:
        ResourceError: the model does not fit this machine; what it needs is printed before.
    """
    import torch

    from reap_driver.cli import calibrate
    from reap_driver.memory.decision import decide
    from reap_driver.memory.forecast import forecast
    from reap_driver.memory.machine import this_machine
    from reap_driver.memory.rates import measure

    device = calibrate.device_of(args)
    sizes, stored, work = _inputs(args, console)
    machine = this_machine(device, Path() if args.out is None else args.out.parent)
    _say(console, _model_lines(sizes, stored, work))
    _say(console, _need_lines(sizes, machine, work))
    plan = decide(args.stream, sizes, machine, work)
    _say(console, plan.lines())
    rates = measure(device, getattr(torch, sizes.dtype), stored.largest_file)
    found = forecast(plan, sizes, stored, work, rates)
    _say(console, _time_lines(plan, found, rates))
    return {"dry_run": True, **_facts(sizes, stored, machine, work, plan, rates, found)}


def _inputs(
    args: argparse.Namespace, console: Console
) -> "tuple[ModelSizes, CheckpointSize, Workload]":
    """Sizes in memory and on disk, and the work."""
    from reap_driver.cli import calibrate
    from reap_driver.compat.model_config import load_config
    from reap_driver.compat.pretrained import meta_model
    from reap_driver.load.storage import check_storage
    from reap_driver.memory.checkpoint_size import estimated, run_dtype, stored_files
    from reap_driver.memory.model_sizes import model_sizes
    from reap_driver.memory.workload import workload
    from reap_driver.model.discover import find_moe_layers
    from reap_kernels.errors import UnsupportedModel

    with _config_folder(args.model) as folder:
        config = load_config(folder, trust_remote_code=args.trust_remote_code)
        model = meta_model(config)
        files = stored_files(Path(folder), config) if Path(folder).is_dir() else None
        check_storage(folder, config, None if files is None else files.tensors, model)
    try:
        layers = find_moe_layers(model)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{args.model}: {error}") from error
    seq_len = calibrate.check_options(args, config)
    calibrate.check_packing(args, model.config, layers)
    dtype = run_dtype(args.dtype, config, files)
    sizes = model_sizes(model, layers, dtype=dtype, seq_len=seq_len)
    work = workload(
        model,
        layers,
        tokens=_count_tokens(args, config, seq_len, console),
        seq_len=seq_len,
        device=calibrate.device_of(args),
        dtype=dtype,
        batch_size=args.batch_size,
    )
    return sizes, files or estimated(model, config, dtype), work


@contextmanager
def _config_folder(model: str) -> Iterator[str]:
    """A folder for MODEL: itself, that of its config.json, or one made for another .json file."""
    from reap_kernels.errors import ReapError

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


def _count_tokens(
    args: argparse.Namespace, config: "PretrainedConfig", seq_len: int, console: Console
) -> int:
    """As said, or those of the data, read as a real run would."""
    from reap_driver.cli import calibrate

    if args.tokens is not None:
        return int(args.tokens)
    wanted = calibrate.sources_of(args)
    sources = calibrate.read_data(args, wanted, config, seq_len, console)
    for line in calibrate.group_lines([source.provenance() for source in sources]):
        console.say(line)
    return sum(source.tokens for source in sources)


def _say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.say(line)


def _need_lines(sizes: "ModelSizes", machine: "Machine", work: "Workload") -> Iterator[str]:
    """What each way of holding the model needs at least, and what is free."""
    from reap_driver.memory.decision import resident, streamed

    yield from _way_lines("resident", resident(sizes, machine, work, full=False))
    yield from _way_lines("streamed", streamed(sizes, machine, work, "file", full=False))
    yield from _machine_lines(machine)


def _model_lines(sizes: "ModelSizes", stored: "CheckpointSize", work: "Workload") -> Iterator[str]:
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


def _machine_lines(machine: "Machine") -> Iterator[str]:
    """What is free."""
    said = []
    if machine.accelerated:
        free = machine.device_free
        said.append(f"{machine.device} {'unknown' if free is None else in_bytes(free.nbytes)}")
    free = machine.host_free
    said.append("host unknown" if free is None else f"host {in_bytes(free.nbytes)} {free.bound}")
    said.append(f"disk {in_bytes(machine.disk_free)} at {machine.disk}")
    yield row("free", "; ".join(said))


def _way_lines(name: str, plan: "Decision") -> Iterator[str]:
    """What one way of holding the model needs, with the fewest sequences at a time."""
    for where, text in plan.needs():
        yield row(name, f"{where} {text}")
        name = ""


def _time_lines(plan: "Decision", found: "Forecast", rates: "Rates") -> Iterator[str]:
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


def _facts(
    sizes: "ModelSizes",
    stored: "CheckpointSize",
    machine: "Machine",
    work: "Workload",
    plan: "Decision",
    rates: "Rates",
    found: "Forecast",
) -> dict[str, Any]:
    """Everything for JSON: bytes, seconds, operations."""
    device, host = machine.device_free, machine.host_free
    return {
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
        "checkpoint": {"bytes": stored.nbytes, "origin": stored.origin, "format": stored.format},
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
