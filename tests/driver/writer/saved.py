"""Checkpoints on disk for the writer's tests: saving, planning, reading back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from reap_driver.compat.model_config import config_digest, load_config
from reap_driver.model.discover import MoELayer, find_moe_layers
from reap_driver.planning.plan import LayerPlan, Plan
from tests.driver import zoo

Chooser = Callable[[MoELayer, torch.Generator], list[int]]

# transformers 5.18's save_pretrained writes names that published checkpoints of these models do
# not have (it reverses a renaming too often); (wrong, right).
_SAVED_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "kimi_k25": (("language_model.model.blocks.", "language_model.model.layers."),),
    "kimi_linear": ((".0.block_sparse_moe.", ".0.mlp."),),
    "hy_v4": ((".mlp.linear_gate.", ".mlp.gate_proj."),),
}


def save(name: str, folder: Path, **overrides: Any) -> PreTrainedModel:
    """Save a tiny random model of an architecture under its published key names."""
    _, model = zoo.tiny(name, **overrides)
    model.save_pretrained(folder)
    rename_keys(folder, _SAVED_NAMES.get(name, ()))
    return model


def rename_keys(folder: Path, replacements: tuple[tuple[str, str], ...]) -> None:
    """Rename keys of an unsharded checkpoint."""

    def renamed(key: str) -> str:
        for wrong, right in replacements:
            key = key.replace(wrong, right)
        return key

    if replacements:
        change_tensors(folder, lambda tensors: {renamed(k): v for k, v in tensors.items()})


def change_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Rewrite an unsharded checkpoint's tensors."""
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    path.unlink()
    save_file(change(tensors), path, metadata={"format": "pt"})


def change_config(folder: Path, **fields: object) -> None:
    """Set fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def scattered(layer: MoELayer, generator: torch.Generator) -> list[int]:
    """An odd number of experts, not contiguous; three of every routing group where there are
    any.
    """
    size = layer.num_experts // layer.n_group
    keep = 5 if layer.n_group == 1 else 3
    return sorted(
        group * size + int(expert)
        for group in range(layer.n_group)
        for expert in torch.randperm(size, generator=generator)[:keep]
    )


def differing() -> Chooser:
    """5, 4, 7 experts in turn, 3 or all 4 of every routing group; alike in one decoder layer."""
    places: dict[str, int] = {}

    def choose(layer: MoELayer, generator: torch.Generator) -> list[int]:
        number = next(part for part in layer.name.split(".") if part.isdigit())
        place = places.setdefault(number, len(places))
        keep = (5, 4, 7)[place % 3] if layer.n_group == 1 else (3, 4)[place % 2]
        size = layer.num_experts // layer.n_group
        return sorted(
            group * size + int(expert)
            for group in range(layer.n_group)
            for expert in torch.randperm(size, generator=generator)[:keep]
        )

    return choose


def make_plan(
    folder: Path, model: PreTrainedModel, choose: Chooser = scattered, seed: int = 0
) -> Plan:
    """A plan for a saved model; each layer keeps other experts."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in find_moe_layers(model):
        kept = tuple(choose(layer, generator))
        layers[layer.name] = LayerPlan.keeping(layer.num_experts, kept)
    removed = sum(len(layer.removed) for layer in layers.values())
    return Plan(
        model={"id": "acme/tiny", "config_digest": config_digest(load_config(folder))},
        criterion="reap",
        allocation="uniform",
        ratio=removed / sum(layer.num_experts for layer in layers.values()),
        layers=layers,
        scores_digest="sha256:0",
    )


def shard(folder: Path, parts: int) -> None:
    """Divide an unsharded checkpoint into numbered shards, keys dealt out in turn."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        held = {key: tensors[key].clone() for key in sorted(tensors)[part::parts]}
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )


def write_all(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as an unsharded checkpoint."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, sharded or not, read by the safetensors library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(read_all_of(path))
    return tensors


def read_all_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes (formats such as float8 have no comparison of their own)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of every file, to see that nothing was touched."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
