"""What the GPU did while something was timed: SM clock, power and reasons for lower clocks.

A thread asks NVML every few milliseconds, where `pynvml` (PyPI: nvidia-ml-py) is installed; where
it is not, columns stay empty and `Watch.note` says so.
"""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

COLUMNS = ("sm_mhz", "watts", "throttled")
_EVERY = 0.005
# Bits of NVML's clocks-event reasons; idle (1) and clocks set by an application (2) are none.
_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}

Window = tuple[float, float]


class Watch:
    """Samples of one device.

    Attributes:
        note: why there are none, or the interval at which they are taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples: list[tuple[float, int, float, int]] = []
        self._nvml: Any = None
        self.note = self._opened()

    def __reduce__(self) -> tuple[type["Watch"], tuple[torch.device]]:
        return Watch, (self._device,)

    def _opened(self) -> str:
        if self._device.type != "cuda":
            return "no CUDA device"
        try:
            import pynvml
        except ImportError:
            return "pynvml is not installed: pip install nvidia-ml-py"
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml
            self._sample()
        except Exception as error:  # noqa: BLE001  a driver without NVML, or a part of a GPU
            self._nvml = None
            return f"NVML says nothing here: {type(error).__name__}: {error}"
        return f"sampled every {_EVERY * 1e3:.0f} ms"

    def _sample(self) -> None:
        nvml, handle = self._nvml, self._handle
        clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        self._samples.append((time.perf_counter(), clock, watts, reasons))

    def _run(self, end: threading.Event) -> None:
        while not end.wait(_EVERY):
            self._sample()

    @contextmanager
    def window(self, into: list[Window]) -> Iterator[None]:
        """Samples are taken inside; `into` is given when it began and ended."""
        begin, end = time.perf_counter(), threading.Event()
        thread = threading.Thread(target=self._run, args=(end,), daemon=True)
        if self._nvml is not None:
            thread.start()
        try:
            yield
        finally:
            end.set()
            if self._nvml is not None:
                thread.join()
            into.append((begin, time.perf_counter()))

    def columns(self, windows: Sequence[Window]) -> dict[str, object]:
        """Median clock in MHz, mean power in watts, and reasons with their share of the samples."""
        found = [s for s in self._samples for begin, end in windows if begin <= s[0] <= end]
        if not found:
            return dict.fromkeys(COLUMNS, "")
        counts = {
            name: sum(bool(reasons & bit) for *_, reasons in found)
            for bit, name in _REASONS.items()
        }
        shares = [f"{name} {100 * n / len(found):.0f} %" for name, n in counts.items() if n]
        return {
            "sm_mhz": f"{statistics.median(clock for _, clock, _, _ in found):.0f}",
            "watts": f"{statistics.mean(watts for _, _, watts, _ in found):.0f}",
            "throttled": ", ".join(shares) or "no",
        }
