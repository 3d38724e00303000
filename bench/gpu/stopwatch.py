"""When a streamed pass asks for a layer, has it, and lets it go; and the memory it holds meanwhile.

A stand-in for `StreamedModel` in `run_streamed`, so that what is timed is the library's own
loop. It waits for the device where its clock is read: once per layer where layers load while others
compute, when the next one is there, so that a load that is too early for what computes shows.
"""

import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu.clock import Deadline


class Stopwatch:
    """Times of one pass, one entry per layer.

    Args:
        device: where the model computes.
        deadline: once passed, the pass is asked to end.
        ahead: layers load while others compute, as they should; else each is loaded only when it
            is needed, so that both can be timed alone.
        warm: the first batch of every layer does not count.

    Attributes:
        loads: seconds from asking for a layer to having it; with `ahead`, what was left of it.
        computes: seconds of its batches; not taken with `ahead`.
        nbytes: read for it.
    """

    def __init__(
        self,
        device: torch.device,
        deadline: Deadline | None = None,
        *,
        ahead: bool = False,
        warm: bool = False,
    ) -> None:
        self._device, self._deadline, self._ahead, self._warm = device, deadline, ahead, warm
        self.loads: list[float] = []
        self.computes: list[float] = []
        self.nbytes: list[int] = []
        self._there: list[float] = []
        self._asked: float | None = None
        self._began: float | None = None
        self._read = 0
        self._peaks: list[dict[str, int | None]] = []

    def on(self, streamed: Any, stop: Any) -> "Stopwatch":
        """Takes the place of `streamed`."""
        self._streamed, self._stop = streamed, stop
        self.text_layers = streamed.text_layers
        self._read = streamed.bytes_read
        self._host = _host_peak_forgotten()
        self._forget_device_peaks()
        return self

    def prefetch(self, layer: int) -> None:
        """Passes on what is to be loaded ahead."""
        if self._ahead:
            self._streamed.prefetch(layer)

    def ready(self, layer: int, timeout: float | None = None) -> bool:
        """Waits for a layer; once it is there, its computing begins."""
        self._listen()
        if self._asked is None:
            self._asked = self._now()
        if not self._streamed.ready(layer, timeout):
            return False
        if self._peaks:  # what loaded beside the layer before belongs to that one's peak
            self._peaks[-1] = self._memory()
        self._forget_device_peaks()
        self._began = self._now()
        self._there.append(self._began)
        self.loads.append(self._began - self._asked)
        read = self._streamed.bytes_read
        self.nbytes.append(read - self._read)
        self._asked, self._read = None, read
        self._first = self._warm
        return True

    def batch(self, _: float) -> None:
        """A batch was run; the first may be for warming up."""
        self._listen()
        if self._first:
            self._first, self._began = False, self._now()

    def release(self, layer: int) -> None:
        """A layer's batches are run."""
        assert self._began is not None
        if not self._ahead:
            self.computes.append(self._now() - self._began)
        self._peaks.append(self._memory())
        self._streamed.release(layer)

    def overlapped(self, layer: int) -> float:
        """Seconds from having a layer to having the next, with the layer's batches run."""
        return self._there[layer + 1] - self._there[layer]

    def memory(self, layer: int) -> dict[str, int | None]:
        """Peaks in bytes while a layer computed and the next one loaded; None: nobody says."""
        return self._peaks[layer]

    def _listen(self) -> None:
        if self._deadline is not None and self._deadline.passed():
            self._stop.requested = True

    def _now(self) -> float:
        """The time, with everything queued on the device done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _memory(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {"device_gb": None, "pinned_gb": None}
        if self._device.type == "cuda":
            found["device_gb"] = torch.cuda.max_memory_allocated(self._device)
            found["pinned_gb"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak")
        return {**found, "host_gb": _host_peak() if self._host else None}

    def _forget_device_peaks(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def _host_peak_forgotten() -> bool:
    """Begins the system's record of this process's largest memory anew; whether it could."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _host_peak() -> int | None:
    """Largest memory of this process since then."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
