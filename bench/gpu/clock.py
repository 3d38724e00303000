"""Time: of device work by events, and how much of a stage's budget is left."""

import time
from collections.abc import Callable, Sequence

import torch


def times(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, taken in turn from `calls`.

    On a GPU between two events around the call, with the calls queued back to back; on the CPU by
    the host's clock. Nothing is warmed up here.
    """
    if device.type != "cuda":
        taken = []
        for index in range(repeats):
            start = time.perf_counter()
            calls[index % len(calls)]()
            taken.append(time.perf_counter() - start)
        return taken
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        return queued(calls, repeats)


# Cycles of a kernel behind which the host runs ahead: about 25 ms.
_AHEAD = 50_000_000


def busy(device: torch.device) -> None:
    """Gives the device about 25 ms of other work, behind which the host can queue calls ahead."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda._sleep(_AHEAD)


def behind(
    calls: Sequence[Callable[[], object]], device: torch.device, repeats: int
) -> list[float]:
    """As `times`, behind other work: the device's time alone, also of calls that are shorter than
    the host takes to launch them.
    """
    if device.type != "cuda":
        return times(calls, device, repeats)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        busy(device)
        return queued(calls, repeats)


def queued(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds between events around each call, in a row, behind whatever the device has to do."""
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for index, (begin, end) in enumerate(pairs):
        begin.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


class Deadline:
    """A moment after which a stage starts nothing more. The wall clock: processes share it."""

    def __init__(self, seconds: float) -> None:
        self.end = time.time() + seconds

    def left(self) -> float:
        """Seconds left, below 0 once passed."""
        return self.end - time.time()

    def passed(self) -> bool:
        """Whether nothing more may start."""
        return self.left() <= 0

    @property
    def reason(self) -> str:
        """Why what was skipped was skipped."""
        return "the stage's share of the budget was spent; give more with --budget"
