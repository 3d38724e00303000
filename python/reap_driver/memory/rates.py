"""How fast a machine reads, copies and multiplies: measured in about one second each, or given."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reap_driver.memory.given_machine import AS_GIVEN, GivenMachine
from reap_kernels.experts.cpu import compute_dtype

READ_BYTES = 256 << 20
_CHUNK = 8 << 20
_PAGE = 4096
_SECONDS = 0.7  # of one measurement, about 1 with its preparation


@dataclass(frozen=True)
class Rate:
    """A rate per second, and how it was measured or who says so, in words."""

    per_second: float
    how: str


@dataclass(frozen=True)
class Rates:
    """The rates of a machine; None where one is not known or, as copying on a CPU, not needed.

    Attributes:
        disk: bytes read per second.
        copy: bytes copied from host to GPU per second.
        matmul: floating-point operations per second in the run's dtype.
        unknown: {name of a rate: why it is not known, or what would tell it}.
    """

    disk: Rate | None
    copy: Rate | None
    matmul: Rate | None
    unknown: Mapping[str, str] = field(default_factory=dict)


def measure(device: torch.device, dtype: torch.dtype, file: Path | None) -> Rates:
    """Measures all rates of this machine.

    Args:
        device: the device that the model runs on.
        dtype: the dtype that it runs in.
        file: the largest file of weights; None if there is none. The disk's rate is unknown then,
            and where the file cannot be read.
    """
    disk, unknown = None, {}
    if file is None:
        unknown["disk"] = "there are no weights here to measure the disk with"
    else:
        try:
            disk = disk_rate(file)
        except OSError as error:
            unknown["disk"] = f"{file.name} cannot be read ({error.strerror})"
    return Rates(
        disk=disk,
        copy=copy_rate(device) if device.type == "cuda" else None,
        matmul=matmul_rate(device, dtype),
        unknown=unknown,
    )


def given_rates(given: GivenMachine) -> Rates:
    """The rates of a machine that was described."""
    keys = {"disk": "disk", "copy": "copy", "matmul": "flops"}
    values = {name: getattr(given, key) for name, key in keys.items()}
    needed = [name for name in keys if given.gpus or name != "copy"]
    return Rates(
        **{name: None if v is None else Rate(v, AS_GIVEN) for name, v in values.items()},
        unknown={
            name: f"{keys[name]}=RATE in `machine` would tell"
            for name in needed
            if values[name] is None
        },
    )


def disk_rate(file: Path, most: int = READ_BYTES) -> Rate:
    """Bytes per second of one sequential reader from the beginning of `file`.

    The system is first asked to drop the file from its page cache. Whether it did is tested with
    non-blocking reads, which succeed only for cached pages.
    """
    buffer = memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as stream:
        size = min(most, os.fstat(stream.fileno()).st_size)
        if sys.platform == "linux":
            os.posix_fadvise(stream.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        cached = _cached(stream.fileno(), size)
        done, began = 0, time.perf_counter()
        while done < size and time.perf_counter() - began < _SECONDS:
            count = stream.readinto(buffer[: min(_CHUNK, size - done)])
            if not count:
                break
            done += count
        seconds = time.perf_counter() - began
    where = {
        None: "from the disk or the page cache: the system does not say which",
        True: "from the page cache, not the disk",
        False: "from the disk",
    }[cached]
    return Rate(done / seconds, f"{done / 1e6:.0f} MB of {file.name} {where}")


def _cached(descriptor: int, size: int) -> bool | None:
    """Whether most of a file's first `size` bytes are in the page cache; None if unknown."""
    if sys.platform != "linux":
        return None
    found, places = 0, range(0, size, max(_PAGE, size // 16))
    for offset in places:
        try:
            found += os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            continue
        except OSError:  # the file system does not support the flag
            return None
    return 2 * found > len(places)


def copy_rate(device: torch.device) -> Rate:
    """Bytes per second from pinned host memory to a GPU."""
    source = torch.empty(READ_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(READ_BYTES, dtype=torch.uint8, device=device)
    seconds = _fastest(lambda: target.copy_(source, non_blocking=True), device)
    return Rate(READ_BYTES / seconds, f"{READ_BYTES / 1e6:.0f} MB from pinned memory to {device}")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> Rate:
    """Operations per second of a square matrix product, in the dtype the kernels compute in."""
    used = compute_dtype(dtype) if device.type == "cpu" else dtype
    side = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(side, side, device=device).to(used) for _ in range(2))
    seconds = _fastest(lambda: left @ right, device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = str(used).removeprefix("torch.")
    return Rate(2 * side**3 / seconds, f"{name} product of {side} x {side} on {device}{threads}")


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one warm-up call."""
    best = float("inf")
    began = time.perf_counter()
    _once(work, device)
    while best == float("inf") or time.perf_counter() - began < _SECONDS:
        best = min(best, _once(work, device))
    return best


def _once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with synchronization."""
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began
