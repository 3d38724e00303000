"""What the output holds: its tensors, and how they are divided into files."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reap_driver.files.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from reap_driver.files.fingerprints import Fingerprints
from reap_driver.files.safetensors_file import (
    DTYPE_BITS,
    SafetensorsFile,
    TensorEntry,
    encode_header,
    tensor_bytes,
)
from reap_driver.writer.actions import Action, Compute, Drop, Select, SelectCodes
from reap_driver.writer.codes import words_of
from reap_kernels.errors import PlanError, UnsupportedModel

_NUMBERED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor to write: its source, and what happens to it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorEntry
    action: Action

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass
class OutShard:
    """One file to write. Its sources must be as they were when they were inspected."""

    name: str
    tensors: list[OutTensor] = field(default_factory=list)
    metadata: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Fingerprints = field(default_factory=Fingerprints)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def header(self) -> bytes:
        """The file's header."""
        return encode_header({t.name: (t.dtype, t.shape) for t in self.tensors}, self.metadata)


def out_tensor(key: str, entry: TensorEntry, action: Action) -> OutTensor | None:
    """The tensor that an action writes; None for a dropped one.

    Raises:
        UnsupportedModel: rows that are selected share bytes.
    """
    if isinstance(action, Drop):
        return None
    shape = list(entry.shape)
    if isinstance(action, Select):
        shape[action.dim] = len(action.rows[0])
        inner = math.prod(entry.shape[action.dim + 1 :]) * DTYPE_BITS[entry.dtype]
        if inner % 8:
            raise UnsupportedModel(
                f"{key}: dtype {entry.dtype} packs rows of dimension {action.dim} into shared "
                "bytes; "
                "unpack the checkpoint first."
            )
    elif isinstance(action, Compute):
        shape = list(action.shape)
    elif isinstance(action, SelectCodes):
        shape[action.dim] = words_of(len(action.positions), action.bits)
    return OutTensor(action.name, entry.dtype, tuple(shape), entry, action)


def plan_shards(
    source: Checkpoint,
    actions: Mapping[str, Action],
    shard_size: int | None,
    rename: Callable[[Mapping[str, str]], Mapping[str, str]] = dict,
) -> list[OutShard]:
    """The files to write, divided as in the source or by size.

    Files that would have no tensor are left out, and numbered names are then numbered anew.

    Args:
        source: the checkpoint.
        actions: for each of its keys.
        shard_size: bytes of data per file; None keeps the division of the source.
        rename: makes a file's metadata from that of the source.

    Raises:
        PlanError: `shard_size` is not positive.
    """
    if shard_size is not None and shard_size <= 0:
        raise PlanError(f"shard_size {shard_size}: give a positive number of bytes.")
    shards = [_shard(source.relative(file), file, actions) for file in source.shards]
    if shard_size is not None:
        whole = {key: text for shard in shards for key, text in shard.metadata.items()}
        shards = _divide([t for shard in shards for t in shard.tensors], shard_size)
        for shard in shards:
            shard.metadata = whole
    shards = [shard for shard in shards if shard.tensors]
    for shard in shards:
        shard.fingerprints = source.fingerprints
        shard.metadata = rename(shard.metadata) or {"format": "pt"}
        # Wider elements first keeps every tensor aligned to its element size; source order
        # otherwise.
        shard.tensors.sort(key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    changed = shard_size is not None or len(shards) != len(source.shards)
    if len(shards) == 1 and changed:
        shards[0].name = SINGLE_NAME
    elif changed and all(_NUMBERED.fullmatch(shard.name) for shard in shards):
        for number, shard in enumerate(shards, 1):
            shard.name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


def write_index(folder: Path, shards: list[OutShard], metadata: Mapping[str, Any]) -> int:
    """Writes `model.safetensors.index.json`, unless the only file has the name that needs no index.

    Returns:
        Its size in bytes; 0 if there is none.
    """
    if [shard.name for shard in shards] == [SINGLE_NAME]:
        return 0
    index = {
        "metadata": {
            **{k: v for k, v in metadata.items() if k != "total_parameters"},
            "total_size": sum(shard.nbytes for shard in shards),
        },
        "weight_map": {t.name: shard.name for shard in shards for t in shard.tensors},
    }
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (folder / INDEX_NAME).write_text(text, encoding="utf-8")
    return len(text.encode())


def _shard(name: str, file: SafetensorsFile, actions: Mapping[str, Action]) -> OutShard:
    """The file that one file of the source becomes."""
    made = (out_tensor(key, entry, actions[key]) for key, entry in file.tensors.items())
    return OutShard(name, [tensor for tensor in made if tensor is not None], file.metadata)


def _divide(tensors: list[OutTensor], shard_size: int) -> list[OutShard]:
    """Fills files in source order up to `shard_size`; a larger tensor gets a file of its own."""
    shards: list[OutShard] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append(OutShard(f"model-{len(shards) + 1:05d}-of-00000.safetensors"))
            room = shard_size
        shards[-1].tensors.append(tensor)
        room -= tensor.nbytes
    return shards
