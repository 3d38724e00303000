"""What a machine has: memory that is free on the device and the host, room on a disk."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reap_driver.memory.host import Free, free_host_memory


@dataclass(frozen=True)
class Machine:
    """What is free before a model is loaded.

    Attributes:
        device: where the model computes, such as "cpu" or "cuda:0".
        device_free: memory there; on a CPU that of the host; None where the system does not say.
        host_free: main memory; None where the system does not say.
        disk: folder for states that fit no memory.
        disk_free: bytes this user may still write there.
    """

    device: str
    device_free: Free | None
    host_free: Free | None
    disk: Path
    disk_free: int

    @property
    def accelerated(self) -> bool:
        """Whether the device has a memory of its own."""
        return self.device.partition(":")[0] != "cpu"

    def shared(self, processes: int) -> "Machine":
        """What each of several equal processes of this machine may take, one device for each.

        On a CPU they share all of it.
        """
        host = None if self.host_free is None else self.host_free.divided(processes)
        device = self.device_free if self.accelerated else host
        free = self.disk_free // processes
        return replace(self, device_free=device, host_free=host, disk_free=free)


def this_machine(device: torch.device, disk: Path) -> Machine:
    """The machine this runs on.

    Args:
        device: where the model is to compute.
        disk: folder for states that fit no memory; it need not exist yet.
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
    """Memory a forward on `device` could still allocate; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Free(torch.cuda.mem_get_info(device)[0] + cached, "by the GPU's driver")
    return free_host_memory() if device.type == "cpu" else None
