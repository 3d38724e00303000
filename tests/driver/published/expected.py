"""The expected pruned checkpoint, computed only from the table and the kept experts."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.driver.published.checkpoint import State, is_mtp
from tests.driver.published.entry import Published
from tests.driver.published.reduce import get_field, set_field


def expected_tensors(
    entry: Published,
    config: dict[str, Any],
    source: State,
    kept: Mapping[str, tuple[int, ...]],
    *,
    mtp: bool = False,
) -> State:
    """The tensors of the pruned checkpoint, by name.

    Args:
        entry: the model's table entry.
        config: its `config.json` before pruning.
        source: its tensors before pruning.
        kept: kept experts by the disk prefix of their MoE block (MTP layers that stay included).
        mtp: whether MTP layers stay.
    """
    expected: State = {}
    for key, tensor in source.items():
        if is_mtp(key, entry, config) and not mtp:
            continue
        block = next((prefix for prefix in kept if key.startswith(prefix)), "")
        name, experts = key.removeprefix(block), kept.get(block, ())
        one_expert = re.match(r"experts\.(\d+)\.(.+)", name)
        dim = 0 if name in entry.stacked else entry.routers.get(name)
        if not block:
            expected[key] = tensor
        elif dim is not None:
            expected[key] = tensor.index_select(dim, torch.tensor(experts))
        elif one_expert is None:
            expected[key] = tensor
        elif (old := int(one_expert[1])) in experts:
            expected[f"{block}experts.{experts.index(old)}.{one_expert[2]}"] = tensor
    return expected


def expected_config(
    entry: Published, config: dict[str, Any], *, mtp: bool = False
) -> dict[str, Any]:
    """`config.json` after pruning: other counts, no MTP layers (unless kept), all else alike."""
    edited: dict[str, Any] = json.loads(json.dumps(config))
    for field in entry.counts:
        set_field(edited, field, entry.kept)
    if not mtp:
        for field, value in entry.cleared.items():
            set_field(edited, field, value)
        for field in entry.per_layer:
            set_field(edited, field, get_field(edited, field)[: config["num_hidden_layers"]])
    return edited


def read_tensors(folder: Path) -> State:
    """Every tensor in the index of a checkpoint; checks that the shards hold no others."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (safe_open is not iterable)
                assert index.get(key) == file.name, f"{file.name} holds {key}, unknown to the index"
                tensors[key] = opened.get_tensor(key)
    assert tensors.keys() == index.keys()
    return tensors


def dequantized(tensors: State) -> State:
    """The tensors of an FP8 checkpoint in float32, each block of 128 x 128 times its scale."""
    values: State = {}
    for key, tensor in tensors.items():
        if key.endswith("_scale_inv"):
            continue
        values[key] = tensor.float()
        if (blocks := tensors.get(key + "_scale_inv")) is not None:
            rows, columns = tensor.shape
            scale = blocks.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            values[key] = values[key] * scale
    return values


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes (float8 has no comparison, NaN is not equal to itself)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_bytes = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right))
    return torch.equal(*as_bytes)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by name."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }
