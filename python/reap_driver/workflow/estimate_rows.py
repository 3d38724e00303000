"""What an estimate prints: rows of a report, and the same facts as JSON values."""

from collections.abc import Iterator
from typing import Any

from reap_driver.base.units import clock, in_bytes, in_operations, row, short
from reap_driver.memory.checkpoint_size import CheckpointSize
from reap_driver.memory.decision import Decision, resident, streamed
from reap_driver.memory.forecast import Forecast
from reap_driver.memory.host_memory import Free
from reap_driver.memory.machine import Machine
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.memory.rates import Rate, Rates
from reap_driver.memory.workload import Workload
from reap_driver.workflow.sizes import Leaves

_ORIGINS = {"headers": "exact", "index": "as its index says", "estimated": "estimated"}


def model(sizes: ModelSizes) -> Iterator[str]:
    """The model in memory."""
    yield row(
        "model",
        f"{sizes.architecture}: {short(sizes.parameters, 'kMBT')} parameters, "
        f"{short(sizes.active_parameters, 'kMBT')} active per token",
    )
    yield row(
        f"in {sizes.dtype}",
        f"{in_bytes(sizes.weight_bytes)}: {len(sizes.layer_bytes)} decoder layers of up to "
        f"{in_bytes(sizes.largest_layer)}, the rest {in_bytes(sizes.rest_bytes)}",
    )


def model_facts(sizes: ModelSizes) -> dict[str, Any]:
    """The same as JSON values."""
    return {
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
    }


def stored(found: CheckpointSize) -> Iterator[str]:
    """The model's files."""
    yield row("on disk", f"{in_bytes(found.nbytes)} {found.format} ({_ORIGINS[found.origin]})")


def stored_facts(found: CheckpointSize) -> dict[str, Any]:
    """The same as JSON values."""
    return {"bytes": found.nbytes, "origin": found.origin, "format": found.format}


def grams(work: Workload, disk: int) -> Iterator[str]:
    """The Gram matrices, in memory and on disk."""
    yield row(
        "Gram",
        f"{in_bytes(max(work.grams))} for a layer, {in_bytes(sum(work.grams))} for all layers, "
        f"which a resident model holds; {in_bytes(disk)} on disk",
    )


def gram_facts(work: Workload, disk: int) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "layer_bytes": max(work.grams),
        "bytes": sum(work.grams),
        "disk_bytes": disk,
    }


def data(tokens: int, sizes: ModelSizes, work: Workload, machine: Machine) -> Iterator[str]:
    """The data, and the ranks that share it."""
    yield row(
        "data",
        f"{tokens:,} tokens, sequences of {work.seq_len}; between two layers all their states "
        f"take {in_bytes(tokens * sizes.state_bytes)}",
    )
    if machine.ranks > 1:
        yield row(
            "ranks",
            f"{machine.ranks} processes (torchrun --nproc-per-node {machine.ranks}), each with a "
            f"GPU and the whole model, share tokens, host memory and disk; what follows is for one "
            f"of them, with {work.tokens:,} tokens",
        )


def no_data(sizes: ModelSizes, work: Workload) -> Iterator[str]:
    """In place of `data` where the number of tokens is unknown."""
    yield row(
        "data",
        f"unknown; what follows is for one sequence of {work.seq_len} tokens, whose states take "
        f"{in_bytes(work.tokens * sizes.state_bytes)}",
    )


def data_facts(tokens: int, sizes: ModelSizes, work: Workload) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "tokens": tokens,
        "tokens_per_rank": work.tokens,
        "seq_len": work.seq_len,
        "state_bytes": tokens * sizes.state_bytes,
    }


def needs(sizes: ModelSizes, machine: Machine, work: Workload) -> Iterator[str]:
    """What each way of holding the model needs, with the fewest sequences at a time."""
    for name, plan in _ways(sizes, machine, work).items():
        for number, (where, text) in enumerate(plan.needs()):
            yield row("" if number else name, f"{where} {text}")


def needs_facts(sizes: ModelSizes, machine: Machine, work: Workload) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        name: {
            "device_bytes": plan.device_bytes,
            "host_bytes": plan.host_bytes,
            "file_bytes": plan.file_bytes,
        }
        for name, plan in _ways(sizes, machine, work).items()
    }


def _ways(sizes: ModelSizes, machine: Machine, work: Workload) -> dict[str, Decision]:
    """Each way of holding the model, at its least."""
    return {
        "resident": resident(sizes, machine, work, full=False),
        "streamed": streamed(sizes, machine, work, "file", full=False),
    }


def free(machine: Machine) -> Iterator[str]:
    """What is free."""
    device = _amount(machine.device_free, "SIZE after the name")
    said = [f"{machine.device} {device}"] if machine.accelerated else []
    for name, found, key in (
        ("host", machine.host_free, "ram=SIZE"),
        ("disk", machine.disk_free, "free=SIZE"),
    ):
        bound = "" if found is None else f" {found.bound}"
        said.append(f"{name} {_amount(found, key)}{bound}")
    yield row("free", "; ".join(said))


def _amount(found: Free | None, key: str) -> str:
    """What is free of one kind; if unknown, what in `machine` would tell."""
    return f"unknown ({key} in `machine` would tell)" if found is None else in_bytes(found.nbytes)


def free_facts(machine: Machine) -> dict[str, Any]:
    """The same as JSON values."""
    device, host, disk = machine.device_free, machine.host_free, machine.disk_free
    return {
        "device": machine.device,
        "device_bytes": None if device is None else device.nbytes,
        "host_bytes": None if host is None else host.nbytes,
        "host_bound": None if host is None else host.bound,
        "disk_bytes": None if disk is None else disk.nbytes,
        "ranks": machine.ranks,
    }


def pruned(leaves: Leaves, machine: Machine) -> Iterator[str]:
    """What pruning leaves, and the disk that it takes."""
    yield from leaves.lines()
    disk = machine.whole_disk
    there = "an unknown amount" if disk is None else in_bytes(disk)
    yield row("to write it", f"{in_bytes(leaves.output)}; {there} is free on the disk")


def times(plan: Decision, found: Forecast, rates: Rates, ranks: int) -> Iterator[str]:
    """The forecast, with what it rests on."""
    missing = rates.unknown
    amount = in_bytes(found.read_bytes)
    text = _duration(found.read_seconds, amount, rates.disk, missing.get("disk"))
    if ranks > 1 and found.read_seconds is not None:
        most = clock(ranks * found.read_seconds)
        text += f"; each rank reads all of it, {most} where the page cache helps none"
    yield row("read", text)
    if found.copy_bytes:
        amount = in_bytes(found.copy_bytes)
        yield row("copy", _duration(found.copy_seconds, amount, rates.copy, missing.get("copy")))
    if found.spill_bytes:
        pace = "unknown" if found.spill_seconds is None else clock(found.spill_seconds)
        yield row("spill", f"{pace}: {in_bytes(found.spill_bytes)}, as fast as reading")
    flops = in_operations(found.flops)
    if rates.matmul is None or found.compute_seconds is None:
        yield row("compute", f"unknown: {flops}; {missing['matmul']}")
    else:
        rate = f"{in_operations(rates.matmul.per_second)}/s ({rates.matmul.how})"
        yield row("compute", f"{clock(found.compute_seconds)} at least: {flops} at {rate}")
    if found.seconds is None:
        yield row("in all", "unknown, as one of these is")
    else:
        how = "reading while computing" if plan.stream else "loading, then computing"
        yield row("in all", f"{clock(found.seconds)} at least, {how}")


def _duration(seconds: float | None, amount: str, rate: Rate | None, why: str | None) -> str:
    """Bytes at a rate, or why it is not known how long they take."""
    if rate is None or seconds is None:
        return f"unknown: {amount}; {why}"
    return f"{clock(seconds)}: {amount} at {in_bytes(int(rate.per_second))}/s ({rate.how})"
