"""The model and the memory of this machine's processor, for records of what a job ran on."""

import platform
from pathlib import Path

import psutil


def cpu_name() -> str:
    """The name of the processor, as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def physical_memory() -> int:
    """Bytes of the machine's memory."""
    return int(psutil.virtual_memory().total)
