"""Readers of our own formats and of files of tensors."""

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from reap_driver.observation.batch_state import BatchState
from reap_driver.observation.journal import Journal
from reap_driver.observation.journal import read as read_journal
from reap_driver.observation.state_store import read_state, write_state
from reap_driver.plan_search.search_state import SearchState
from reap_driver.plan_search.search_state import read as read_search
from reap_driver.reporting.comparison import comparison_parts, read_comparison
from reap_kernels import SaliencyStats
from reap_kernels.tuning import CONFIGS, KERNELS, Launch, Table
from tests.fuzz.campaign import Nonsense, Reader
from tests.fuzz.changes import container, json_value
from tests.fuzz.inputs import in_file, unsealed
from tests.fuzz.world import World, command


def formats(world: World) -> Iterable[Reader]:
    """Our own formats."""
    new = world.folder / "formats"
    yield Reader(
        "plan",
        [world.plan.read_bytes()],
        json_value,
        in_file(new / "plan.json", partial(_use_plan, world)),
        4,
    )
    journal = Journal(new / "journal", {"model": "m", "seed": 0})
    journal.write(1, SaliencyStats.load(world.stats), seconds=1.0)
    content = (new / "journal/journal.json").read_bytes()
    yield Reader(
        "journal", [content], json_value, in_file(journal.folder / "journal.json", _use_journal), 2
    )
    search = SearchState(new / "search.json", {"model": "m", "seed": 0})
    search.write({(1, 2): 0.5, (2, 1): 0.25}, 1.0)
    yield Reader(
        "search state",
        [search.path.read_bytes()],
        json_value,
        in_file(search.path, _use_search),
        2,
    )
    tables = [path.read_bytes() for path in sorted(CONFIGS.glob("*.json"))]
    yield Reader("launch table", tables, json_value, in_file(new / "table.json", _use_table), 2)
    yield Reader(
        "comparison",
        [world.comparison],
        json_value,
        in_file(new / "comparison.json", _use_comparison),
    )
    for option, valid in (
        ("--layer-ratios", b'{"0": 0.25, "1": 0.5}'),
        ("--protect", b'{"0": [1, 2], "1": [3]}'),
    ):
        yield Reader(
            f"plan {option}",
            [valid, valid.replace(b'"0"', b'"*"')],
            json_value,
            in_file(new / "layers.json", partial(_use_layer_file, world, option)),
        )


def _use_plan(world: World, path: Path) -> None:
    """Applies it: everything a plan says ends in the checkpoint or its card."""
    out = world.folder / "applied"
    shutil.rmtree(out, ignore_errors=True)
    command("apply", world.model, path, "--out", out)
    plan = json.loads(path.read_bytes().decode("utf-8-sig"))
    written = json.loads((out / "config.json").read_text())
    counts = {len(layer["kept"]) for layer in plan["layers"].values()}
    if {
        written["num_experts"] if "num_experts" in written else written["num_local_experts"]
    } != counts:
        raise Nonsense("a plan was applied with another count than it says")


def _use_journal(path: Path) -> None:
    content = read_journal(path.parent)
    Journal(path.parent, content["run"])
    if not 0 <= content["position"] < 2**40 or content["seconds"] < 0:
        raise Nonsense("a journal's position or time is out of range")
    if Path(content["stats"]).name != content["stats"]:
        raise Nonsense("a journal names a file outside its folder")


def _use_search(path: Path) -> None:
    saved = read_search(path)
    for removals, fitness in saved.evaluated.items():
        if any(number < 0 for number in removals) or not abs(fitness) < float("inf"):
            raise Nonsense("a state of a search holds removals or a fitness out of range")


def _use_table(path: Path) -> None:
    for entry in Table.load(path).entries:
        if entry.covers("gate_up", "half", 768, 100.0) and entry.off is not None:
            raise Nonsense(f"line {entry} is off and covers a call")
        launch = entry.launch
        if launch is not None and not _sane(launch):
            raise Nonsense(f"launch {launch} cannot be launched")


def _sane(launch: Launch) -> bool:
    return (
        max(launch.block_m, launch.block_n, launch.block_k) <= 1024
        and launch.num_warps <= 32
        and launch.num_stages <= 16
        and launch.group_m <= 2**16
        and launch.kernel in KERNELS
    )


def _use_comparison(path: Path) -> None:
    comparison_parts(read_comparison(path))


def _use_layer_file(world: World, option: str, path: Path) -> None:
    out = world.folder / "layers-plan.json"
    command("plan", world.stats, "--ratio", "0.5", option, path, "--out", out, "--overwrite")


def containers(world: World) -> Iterable[Reader]:
    """Files of tensors."""
    new = world.folder / "containers"
    yield Reader(
        "statistics",
        [world.stats.read_bytes()],
        container,
        in_file(new / "stats.safetensors", partial(_use_stats, world)),
        3,
    )
    yield Reader(
        "statistics without digest",
        [world.stats.read_bytes()],
        container,
        unsealed(in_file(new / "unsealed.safetensors", partial(_use_stats, world))),
        3,
    )
    yield Reader(
        "masks",
        [world.masks.read_bytes()],
        container,
        in_file(new / "masks.safetensors", partial(_use_masks, world)),
        2,
    )
    new.mkdir(parents=True, exist_ok=True)
    write_state(
        new / "state.safetensors", BatchState.of(0, (torch.ones(2, 3), [torch.ones(4)]), {"/0": {}})
    )
    yield Reader(
        "state between layers",
        [(new / "state.safetensors").read_bytes()],
        container,
        in_file(new / "state.safetensors", lambda path: _use_state(read_state(path))),
    )


def _use_stats(world: World, path: Path) -> None:
    out = world.folder / "stats-plan.json"
    command("plan", path, "--ratio", "0.5", "--out", out, "--overwrite")


def _use_masks(world: World, path: Path) -> None:
    from reap_driver.writer.mask_file import load_masks

    for kept in load_masks(path).values():
        if not kept or any(not 0 <= expert < 8 for expert in kept):
            raise Nonsense("masks keep no expert, or one that no layer has")


def _use_state(state: BatchState) -> None:
    state.output()
    state.changes()
    if sum(tensor.untyped_storage().nbytes() for tensor in state.tensors) > 10**6:
        raise Nonsense("a state is larger than its file")
