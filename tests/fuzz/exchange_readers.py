"""Readers of files of other tools: what is accepted is planned from, or applied."""

import io
import json
import shutil
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from random import Random

import torch

from reap_driver.interchange.formats import FORMATS
from tests.fuzz.campaign import Nonsense, Reader
from tests.fuzz.changes import json_value, raw_bytes
from tests.fuzz.inputs import in_file
from tests.fuzz.world import World, command


def exchanged(world: World) -> Iterable[Reader]:
    """Every format that is read."""
    new = world.folder / "exchanged"
    for one in FORMATS.values():
        if not one.reads:
            continue
        path = new / f"{one.name}.json"
        new.mkdir(exist_ok=True)
        source = world.stats if one.holds == "stats" else world.plan
        command("convert", source, "--to", one.name, "--out", path, "--overwrite")
        change, use = (
            (_observations, _use_stats) if one.holds == "stats" else (json_value, _use_plan)
        )
        valid = path.read_bytes()
        yield Reader(one.name, [valid], change, in_file(path, partial(use, world, one.name)))
    unknown = [b'{"pruned_experts": [[0, 1]]}', b'{"kept_per_layer": 1, "keep": [[0]]}', b"{}"]
    place = in_file(new / "unknown", partial(_use_unknown, world))
    yield Reader("a file of another tool", [], json_value, place, odd=unknown)


def _observations(content: bytes, rng: Random) -> bytes:
    """Changes of what `torch.save` wrote: of one value in it, or of its bytes."""
    if rng.random() < 0.3:
        return raw_bytes(content, rng)
    layers = torch.load(io.BytesIO(content), weights_only=True)
    layer = rng.choice(list(layers))
    key = rng.choice(list(layers[layer]))
    value = layers[layer][key]
    choices = [
        lambda: value * rng.choice([-1, 0, 2, 1e9]),
        lambda: value.to(rng.choice([torch.float16, torch.int8, torch.complex64, torch.bool])),
        lambda: value.flatten()[:3],
        lambda: torch.full_like(value, -1),
        lambda: value.expand(2, *value.shape),
        lambda: value.to_sparse() if value.ndim else value,
        lambda: value.to("meta"),
        lambda: torch.nn.Parameter(value, requires_grad=value.is_floating_point()),
        lambda: rng.choice([None, "x", [1.0], {}, 3]),
    ]
    layers[layer][key] = rng.choice(choices)()
    if rng.random() < 0.1:
        layers[rng.choice([-1, 7, "0", 2.5])] = layers.pop(layer)
    changed = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's, of sparse tensors
        torch.save(layers, changed)
    return changed.getvalue()


def _use_stats(world: World, name: str, path: Path) -> None:
    out = world.folder / "imported.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's, of damaged pickles
        _converted(world, name, path, "stats", out)
    command("plan", out, "--ratio", "0.5", "--out", world.folder / "imported.json", "--overwrite")


def _use_plan(world: World, name: str, path: Path) -> None:
    plan, out = world.folder / "imported.json", world.folder / "imported"
    _converted(world, name, path, "plan", plan)
    shutil.rmtree(out, ignore_errors=True)
    command("apply", world.model, plan, "--out", out)
    counts = {len(layer["kept"]) for layer in json.loads(plan.read_text())["layers"].values()}
    config = json.loads((out / "config.json").read_text())
    if {config.get("num_experts", config.get("num_local_experts"))} != counts:
        raise Nonsense("an imported plan was applied with another count than it says")


def _converted(world: World, name: str, path: Path, to: str, out: Path) -> None:
    words = ("--from", name, "--to", to, "--model", world.model, "--out", out, "--overwrite")
    command("convert", path, *words)


def _use_unknown(world: World, path: Path) -> None:
    words = ("--to", "plan", "--model", world.model, "--out", world.folder / "unknown.json")
    command("convert", path, *words, "--overwrite")
