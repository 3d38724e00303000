"""The ranks of a data-parallel run, and the same in one process for comparison."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from reap_driver.observation.data_parallel import Ranks, ranks
from reap_driver.observation.observer import observe
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import DataError
from tests.driver import zoo

# (group, number of batches). Five and one: the ranks never have equal shares.
GROUPS = {"code": 5, "chat": 1}


def observed(name: str, world: Ranks) -> SaliencyStats:
    """This rank's statistics of every group."""
    config, model = zoo.tiny(name)
    with observe(model) as obs:
        for seed, (group, batches) in enumerate(GROUPS.items()):
            with obs.group(group):
                obs.group_index()
                for index in world.share(batches):
                    obs(**zoo.tiny_inputs(name, config, seed=10 * seed + index))
            obs.add_source({"group": group})
    return obs.stats


def idle(name: str, world: Ranks) -> SaliencyStats:
    """Only the last rank has a batch; the others have layers that it leaves out."""
    config, model = zoo.tiny(name)
    with observe(model) as obs:
        if world.rank == world.size - 1:
            obs(**zoo.tiny_inputs(name, config))
    return obs.stats


def by_hand(world: Ranks) -> SaliencyStats:
    """Each rank reached only its own layer; one layer was reached by none; backends differ."""
    names = [f"layer.{i}" for i in range(world.size + 1)]
    layers = {name: LayerStats(2) for name in names}
    mine = layers[names[world.rank]]
    mine.tokens += 2**53  # as many as statistics may have
    mine.count[0, 1] = 2**53 - 1 - world.rank  # more than a float32 counts
    mine.out_max[0, 1] = mine.out_min[0, 1] = world.rank
    facts = {
        "model": {"config_digest": "same"},
        "layers": {names[world.rank]: {"num_experts": 2}},
        "backend": ("cpu", "reference+cpu", "triton")[world.rank],
        "created": f"by {world.rank}",
        "unobserved": [name for name in names if name != names[world.rank]],
    }
    return SaliencyStats({names[world.rank]: mine}, ["default"], facts)


def _save(stats: SaliencyStats | None, path: Path, world: Ranks) -> None:
    assert (stats is None) == (world.rank > 0)
    if stats is not None:
        stats.save(path)


def _refusal(call: Callable[..., object], *args: object) -> str:
    try:
        call(*args)
    except DataError as error:
        return str(error)
    return "not refused"


def main(out: Path) -> None:
    with ranks() as world:
        for run in ("first", "second"):
            _save(world.merged(observed("qwen3_moe", world)), out / run, world)
        _save(world.merged(idle("ernie4_5_vl_moe", world)), out / "idle", world)
        _save(world.merged(by_hand(world)), out / "by_hand", world)
        stats = by_hand(world)
        stats.groups = [f"group {world.rank}"]
        said = [_refusal(world.merged, stats)]
        stats.provenance["model"] = {"config_digest": str(world.rank)}
        said.append(_refusal(world.merged, stats))
        (out / f"said{world.rank}").write_text("\n".join(said))
        world.barrier()  # all are there still: a refusal leaves the ranks together
        assert torch.distributed.is_initialized()
        if world.rank == 0:  # the others leave
            del os.environ["TORCHELASTIC_RUN_ID"]  # so nobody will end this rank
            (out / "lost").write_text(_refusal(world.barrier))
    assert not torch.distributed.is_initialized()
