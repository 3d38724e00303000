"""Free memory of a machine: on the device, on the host, and on a disk."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reap_driver.memory.given_machine import AS_GIVEN, GivenMachine
from reap_driver.memory.host_memory import Free, free_host_memory


@dataclass(frozen=True)
class Machine:
    """Memory that is free before a model is loaded.

    Attributes:
        device: the device that the model runs on, such as "cpu", "cuda:0" or "H200".
        device_free: free memory of the device; on a CPU that of the host; None if unknown.
        host_free: free host memory; None if unknown.
        disk_free: free space of the disk for hidden states that do not fit in memory; None if
            unknown.
        ranks: number of processes that share the machine, each with a device of its own; what is
            free is the share of one.
    """

    device: str
    device_free: Free | None
    host_free: Free | None
    disk_free: Free | None
    ranks: int = 1

    @property
    def accelerated(self) -> bool:
        """Whether the device has its own memory, unlike a CPU."""
        return self.device.partition(":")[0] != "cpu"

    @property
    def whole_disk(self) -> int | None:
        """Free bytes of the disk, the shares of all ranks together."""
        return None if self.disk_free is None else self.disk_free.nbytes * self.ranks

    def shared(self, processes: int) -> "Machine":
        """The share of one of several processes on this machine, each with a device of its own.

        On a CPU the processes share all memory.
        """
        host, disk = (
            None if free is None else free.divided(processes)
            for free in (self.host_free, self.disk_free)
        )
        device = self.device_free if self.accelerated else host
        return replace(
            self, device_free=device, host_free=host, disk_free=disk, ranks=self.ranks * processes
        )


def this_machine(device: torch.device, disk: Path) -> Machine:
    """The machine that this process runs on.

    Args:
        device: the device that the model will run on.
        disk: folder for hidden states that do not fit in memory; it need not exist.
    """
    host = free_host_memory()
    return Machine(
        device=str(device),
        device_free=host if device.type == "cpu" else free_device_memory(device),
        host_free=host,
        disk_free=free_disk(disk),
    )


def free_disk(folder: Path) -> Free:
    """Free space of the disk of a folder, which need not exist."""
    there = whole = folder.absolute()
    while not there.exists():
        there = there.parent
    return Free(shutil.disk_usage(there).free, f"on the disk of {whole}")


def planned_machine(given: GivenMachine) -> Machine:
    """The machine that was described, shared by one process per GPU, as under torchrun."""

    def free(nbytes: int | None) -> Free | None:
        return None if nbytes is None else Free(nbytes, AS_GIVEN)

    host = free(given.ram)
    device = free(given.memory) if given.gpus else host
    return Machine(given.name, device, host, free(given.free)).shared(max(1, given.gpus))


def free_device_memory(device: torch.device) -> Free | None:
    """Memory that a forward on `device` can still allocate; None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Free(torch.cuda.mem_get_info(device)[0] + cached, "by the GPU's driver")
    return free_host_memory() if device.type == "cpu" else None
