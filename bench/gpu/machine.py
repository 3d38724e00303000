"""The machine a run measures: its names and versions, and the peaks every figure is a share of."""

import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass

import torch

from bench import rows
from bench.gpu.clock import times
from bench.gpu.nvml import Watch, Window
from reap_kernels import device as devices


@dataclass(frozen=True)
class Machine:
    """Where a run takes place.

    Attributes:
        device: the device measured; the CPU in smoke mode without a GPU.
        smoke: tiny sizes, to see that everything runs; no figure means anything.
        facts: the columns every row begins with.
        peak: FLOP/s of a dense bf16 product, measured.
        copy: bytes/s of a device-to-device copy, read and written, measured.
        watch: its clock and power while something is timed.
    """

    device: torch.device
    smoke: bool
    facts: dict[str, str]
    peak: float
    copy: float
    watch: Watch

    @property
    def cache_bytes(self) -> int:
        """Size of the L2 cache."""
        if self.device.type != "cuda":
            return 1 << 14
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def free_bytes(self) -> int:
        """Memory a call could still allocate."""
        if self.device.type != "cuda":
            return 1 << 30
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached


def survey(device: torch.device, smoke: bool, commit: str | None) -> Machine:
    """Names the machine and measures its peaks; `commit` where git cannot say."""
    watch, size = Watch(device), 128 if smoke else 8192
    peak, copy = _peak(device, size), _copy(device, 1 << (20 if smoke else 30))
    sustained, clock = _sustained(device, size, 0.01 if smoke else 2.0, watch)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    facts = {
        **rows.environment(),
        "gpu": "none" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "driver": _driver(),
        "cuda": str(torch.version.cuda or torch.version.hip or "none"),
        "triton": devices.triton_version() or "absent",
        "peak_tflops": f"{peak / 1e12:.1f}",
        "sustained_tflops": f"{sustained / 1e12:.1f}",
        "sustained_mhz": clock,
        "copy_gb_s": f"{copy / 1e9:.0f}",
        "nvml": watch.note,
        "smoke": "yes" if smoke else "no",
    }
    if commit:  # of a tree that git knows nothing of, so neither whether it was changed
        facts |= {"commit": commit, "dirty": "unknown"}
    return Machine(device, smoke, facts, peak, copy, watch)


def _driver() -> str:
    """The driver's version, or the newest CUDA it serves where nvidia-smi is not there."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "none"
    return f"serves CUDA {torch._C._cuda_getDriverVersion() / 1000:g}"


def _peak(device: torch.device, size: int) -> float:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    times([lambda: a @ b], device, 3)
    return 2 * size**3 / statistics.median(times([lambda: a @ b], device, 30))


def _sustained(device: torch.device, size: int, seconds: float, watch: Watch) -> tuple[float, str]:
    """FLOP/s of the same product once it has run for so many seconds, and the clock it then has."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    windows: list[Window] = []
    end = time.perf_counter() + seconds
    with watch.window(windows):
        taken = times([lambda: a @ b], device, 30)
        while time.perf_counter() < end:
            taken = times([lambda: a @ b], device, 30)
    columns = watch.columns([(end - seconds / 4, windows[0][1])])
    what = f"{columns['sm_mhz']} at {columns['watts']} W" if columns["sm_mhz"] else ""
    return 2 * size**3 / statistics.median(taken), what


def _copy(device: torch.device, size: int) -> float:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times([lambda: target.copy_(source)], device, 3)
    return 2 * size / statistics.median(times([lambda: target.copy_(source)], device, 30))
