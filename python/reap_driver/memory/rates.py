"""How fast this machine reads, copies and multiplies: measured, each within about a second."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from reap_kernels.experts.cpu import compute_dtype

READ_BYTES = 256 << 20
_CHUNK = 8 << 20
_PAGE = 4096
_SECONDS = 0.7  # of one measurement, so that all of it, preparation included, takes about 1


@dataclass(frozen=True)
class Rate:
    """Something per second, and how it was measured, in words."""

    per_second: float
    how: str


@dataclass(frozen=True)
class Rates:
    """What a forecast of time rests on.

    Attributes:
        disk: bytes read; None where there is no file to read.
        copy: bytes from host to device; None where host and device are one.
        matmul: floating-point operations in the run's dtype.
    """

    disk: Rate | None
    copy: Rate | None
    matmul: Rate


def measure(device: torch.device, dtype: torch.dtype, file: Path | None) -> Rates:
    """All rates of this machine.

    Args:
        device: where the model computes.
        dtype: in which.
        file: the largest file of weights, None where there is none.
    """
    return Rates(
        disk=None if file is None else disk_rate(file),
        copy=copy_rate(device) if device.type == "cuda" else None,
        matmul=matmul_rate(device, dtype),
    )


def disk_rate(file: Path, most: int = READ_BYTES) -> Rate:
    """Bytes a second one reader gets from the beginning of `file`, in order.

    The system is first asked to forget the file. Whether it did is looked up, not assumed: a read
    that must not wait for the disk succeeds only where the page is in memory.
    """
    buffer = memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as stream:
        size = min(most, os.fstat(stream.fileno()).st_size)
        if hasattr(os, "posix_fadvise"):
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
        None: "from the disk or its cache: the system does not say which",
        True: "from the page cache, not the disk",
        False: "from the disk",
    }[cached]
    return Rate(done / seconds, f"{done / 1e6:.0f} MB of {file.name} {where}")


def _cached(descriptor: int, size: int) -> bool | None:
    """Whether most of a file's first `size` bytes are in memory; None where nobody can tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    found, places = 0, range(0, size, max(_PAGE, size // 16))
    for offset in places:
        try:
            found += os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            continue
        except OSError:  # the file system does not know the flag
            return None
    return 2 * found > len(places)


def copy_rate(device: torch.device) -> Rate:
    """Bytes a second from pinned host memory to a GPU."""
    source = torch.empty(READ_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(READ_BYTES, dtype=torch.uint8, device=device)
    seconds = _fastest(lambda: target.copy_(source, non_blocking=True), device)
    return Rate(READ_BYTES / seconds, f"{READ_BYTES / 1e6:.0f} MB from pinned memory to {device}")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> Rate:
    """Operations a second of a square product, in the dtype the kernels compute in there."""
    used = compute_dtype(dtype) if device.type == "cpu" else dtype
    side = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(side, side, device=device).to(used) for _ in range(2))
    seconds = _fastest(lambda: left @ right, device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = str(used).removeprefix("torch.")
    return Rate(2 * side**3 / seconds, f"{name} product of {side} x {side} on {device}{threads}")


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    best = float("inf")
    began = time.perf_counter()
    _once(work, device)
    while best == float("inf") or time.perf_counter() - began < _SECONDS:
        best = min(best, _once(work, device))
    return best


def _once(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began
