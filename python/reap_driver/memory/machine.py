"""Free memory of a machine: on the device, on the host, and on a disk."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reap_driver.memory.host_memory import Free, free_host_memory


@dataclass(frozen=True)
class Machine:
    """Memory that is free before a model is loaded.

    Attributes:
        device: the device that the model runs on, such as "cpu" or "cuda:0".
        device_free: free memory of the device; on a CPU that of the host; None if unknown.
        host_free: free host memory; None if unknown.
        disk: folder for hidden states that do not fit in memory.
        disk_free: free bytes on its disk.
    """

    device: str
    device_free: Free | None
    host_free: Free | None
    disk: Path
    disk_free: int

    @property
    def accelerated(self) -> bool:
        """Whether the device has its own memory, unlike a CPU."""
        return self.device.partition(":")[0] != "cpu"

    def shared(self, processes: int) -> "Machine":
        """The share of one of several processes on this machine, each with a device of its own.

        On a CPU the processes share all memory.
        """
        host = None if self.host_free is None else self.host_free.divided(processes)
        device = self.device_free if self.accelerated else host
        free = self.disk_free // processes
        return replace(self, device_free=device, host_free=host, disk_free=free)


def this_machine(device: torch.device, disk: Path) -> Machine:
    """The machine that this process runs on.

    Args:
        device: the device that the model will run on.
        disk: folder for hidden states that do not fit in memory; it need not exist.
    """
    host = free_host_memory()
    there = disk.absolute()
    while not there.exists():
        there = there.parent
    return Machine(
        device=str(device),
        device_free=host if device.type == "cpu" else free_device_memory(device),
        host_free=host,
        disk=disk,
        disk_free=shutil.disk_usage(there).free,
    )


def free_device_memory(device: torch.device) -> Free | None:
    """Memory that a forward on `device` can still allocate; None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Free(torch.cuda.mem_get_info(device)[0] + cached, "by the GPU's driver")
    return free_host_memory() if device.type == "cpu" else None
