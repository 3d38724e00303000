"""Expert maps for vllm-ascend (`expert_map_path`, vllm_ascend/eplb): which device holds which
experts of each MoE layer, counted from 0 without the dense layers.
"""

from collections.abc import Sequence
from pathlib import Path

from reap_driver.interchange.content import Source, uniform_count
from reap_driver.interchange.json_files import write_json
from reap_kernels.errors import PlanError

WHAT = "expert map"


def write(path: Path, source: Source) -> list[str]:
    """Writes a placement in which every device holds equally many experts, and about as many of the
    rows that were observed.

    Args:
        path: of the map.
        source: with statistics and the number of devices; where there is a plan, the map is of the
            pruned checkpoint, which numbers the kept experts anew.

    Returns:
        What to know of it.

    Raises:
        PlanError: layers are left with different numbers of experts, or the devices do not divide
            them.
    """
    if source.plan is not None:
        source.experts_plan(WHAT)
    experts, devices, stats = uniform_count(source, WHAT), source.ep, source.all_statistics(WHAT)
    assert devices is not None  # the table says that the format needs it
    if experts % devices:
        raise PlanError(
            f"{experts} experts are not shared out equally among {devices} devices; give `ep` "
            f"as one of {', '.join(str(n) for n in range(1, experts + 1) if experts % n == 0)}"
        )
    layers = []
    for number, (_, name) in enumerate(sorted(source.model.numbers().items())):
        rows = stats.layers[name].total().count[0].tolist()
        placed = balanced([rows[expert] for expert in source.kept(name)], devices)
        layers.append(
            {
                "layer_id": number,
                "device_count": devices,
                "device_list": [
                    {"device_id": device, "device_expert": ids} for device, ids in enumerate(placed)
                ],
            }
        )
    write_json(path, {"moe_layer_count": len(layers), "layer_list": layers})
    return []


def balanced(loads: Sequence[int], devices: int) -> list[list[int]]:
    """Experts of each device, ascending: the most loaded first, each goes to the device with the
    least load of those that have room.

    Args:
        loads: of each expert.
        devices: their number divides that of the experts.

    Example:
        >>> balanced([9, 1, 5, 4], 2)
        [[0, 1], [2, 3]]
    """
    room = len(loads) // devices
    placed: list[list[int]] = [[] for _ in range(devices)]
    total = [0] * devices
    for expert in sorted(range(len(loads)), key=lambda e: (-loads[e], e)):
        free = (device for device in range(devices) if len(placed[device]) < room)
        device = min(free, key=lambda d: (total[d], d))
        placed[device].append(expert)
        total[device] += loads[expert]
    return [sorted(ids) for ids in placed]
