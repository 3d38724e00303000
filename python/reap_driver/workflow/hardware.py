"""The hardware that a model was observed on: names of models and sizes, no name of a machine."""

from typing import Any

import torch

from reap_driver.base.processor import cpu_name, physical_memory
from reap_driver.observation.data_parallel import Ranks
from reap_driver.workflow.inspection import device_of
from reap_driver.workflow.options import RunOptions


def hardware(run: RunOptions, world: Ranks) -> dict[str, Any]:
    """The devices of a run, as `provenance["observed"]` of statistics has them.

    Args:
        run: the options.
        world: the processes, each with a device of its own.

    Returns:
        `device`, the model's name; `devices`, their number; `memory_bytes` of each, None if
        unknown; on a CPU also `threads` of each process.
    """
    spread = run.device_map is not None and torch.cuda.is_available()
    device = torch.device("cuda") if spread else device_of(run, world)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        number = torch.cuda.device_count() if spread else world.size
        return {"device": found.name, "devices": number, "memory_bytes": found.total_memory}
    name = cpu_name() if device.type == "cpu" else device.type
    return {
        "device": name,
        "devices": 1,
        "memory_bytes": physical_memory(),
        "threads": torch.get_num_threads(),
    }
