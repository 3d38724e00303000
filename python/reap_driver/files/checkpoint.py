"""The checkpoint that is read: its files, checked before anything is written."""

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from reap_driver.files.exchange import restore
from reap_driver.files.fingerprints import Fingerprints
from reap_driver.files.safetensors_file import SafetensorsFile, TensorEntry, read_header
from reap_kernels.documents import parse_json, read_bytes
from reap_kernels.errors import CheckpointError
from reap_kernels.files import exists, is_file
from reap_kernels.schema import short

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_LONGEST = 1000  # characters of the name of a shard

# Weights in other formats, and other copies of the weights: pruning does not reach them, so they
# are left out.
_OTHER_WEIGHTS = frozenset(
    {".bin", ".ckpt", ".ggml", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".onnx_data"}
    | {".ot", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tflite"}
)
_REWRITTEN = frozenset({"config.json", INDEX_NAME, "README.md"})
RECORD = "reap"  # folder in which we keep the statistics and the plan of an output


class Use(enum.Enum):
    """What is done with a file that is no shard."""

    COPIED = enum.auto()
    LEFT_OUT = enum.auto()
    REFUSED = enum.auto()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder in Hugging Face format. Read only."""

    folder: Path
    config: Mapping[str, Any]  # config.json as written
    shards: tuple[
        SafetensorsFile, ...
    ]  # in the order of the index; names are relative to the folder
    small_files: tuple[Path, ...]  # copied along, relative to the folder
    left_out: tuple[Path, ...]  # weights in other formats and hidden files, relative to the folder
    refused: tuple[
        Path, ...
    ]  # neither files of the folder nor of the hub's cache; see `check_copied`
    index_metadata: Mapping[str, Any]
    fingerprints: Fingerprints  # all files that are read, as they were before they were

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor of the checkpoint."""
        return {key: entry for shard in self.shards for key, entry in shard.tensors.items()}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def check_copied(self) -> None:
        """Refuses to copy what no checkpoint has: a link by which a file of this machine would be
        published, a pipe that would never end.

        Raises:
            CheckpointError: naming it, and what it is.
        """
        for path in (self.folder / name for name in self.refused):
            what = "is neither a file nor a folder"
            if path.is_symlink():
                what = f"is a symbolic link to {path.readlink()}, no file of this checkpoint"
            raise CheckpointError(
                f"{path}: {what}, so it is not copied; put a file in its place, or remove it"
            )

    def relative(self, shard: SafetensorsFile) -> str:
        """A shard's name inside the folder."""
        return shard.path.relative_to(self.folder).as_posix()


def resolve_folder(path_or_id: str | Path) -> Path:
    """The checkpoint's folder; a hub id is downloaded (or found in the cache), weights as
    safetensors only.
    """
    folder = Path(path_or_id)
    if not exists(folder):
        restore(folder.absolute())  # a run may have been killed while it replaced this checkpoint
    if exists(folder) and folder.is_dir():
        return folder
    if exists(folder) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_id)):
        raise CheckpointError(f"{path_or_id}: no such folder; give the folder of a checkpoint.")
    from huggingface_hub import snapshot_download

    ignored = [f"*{suffix}" for suffix in sorted(_OTHER_WEIGHTS - {".safetensors"})]
    try:
        return Path(snapshot_download(str(path_or_id), ignore_patterns=ignored))
    except (OSError, ValueError) as error:  # the hub's errors derive from these
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path_or_id}: neither a folder nor a hub id that can be downloaded ({reason})."
        ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read every header of a checkpoint folder and check that files, index and headers agree.

    Raises:
        CheckpointError: no config or weights, an index that leaves the folder or does not match, a
            damaged file, a symbolic link to nothing.
    """
    _check_links(folder)
    described = Fingerprints.of(
        [folder / n for n in ("config.json", INDEX_NAME) if is_file(folder / n)], ()
    )
    config = read_json(folder / "config.json", "give the folder of a Hugging Face checkpoint")
    names, weight_map, index_metadata = _shard_names(folder)
    paths = [folder / name for name in names]
    beside = _beside(folder, set(paths))
    small = tuple(path for path, use in beside.items() if use is Use.COPIED)
    fingerprints = described.with_others(Fingerprints.of([folder / name for name in small], paths))
    shards = tuple(map(read_header, paths))
    _check_index(folder, shards, weight_map)
    _check_duplicates(shards)
    fingerprints.check()  # what was read since then is what was pinned
    left_out = tuple(path for path, use in beside.items() if use is Use.LEFT_OUT)
    refused = tuple(path for path, use in beside.items() if use is Use.REFUSED)
    return Checkpoint(
        folder, config, shards, small, left_out, refused, index_metadata, fingerprints
    )


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file."""
    if not is_file(path):
        raise CheckpointError(f"{path}: no such file; {remedy}.")
    try:
        content = parse_json(read_bytes(path), plain=False)
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a JSON object.")
    return content


def is_weight_file(path: Path) -> bool:
    """Whether a file holds weights, in whatever format, or indexes such files."""
    return path.suffix.lower() in _OTHER_WEIGHTS or path.name.endswith(".index.json")


def _check_links(folder: Path) -> None:
    """Every symbolic link leads somewhere. The hub's cache is made of links, and one whose blob is
    gone would otherwise look like a file that the checkpoint never had.
    """
    for path in _visible(folder):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path}: a symbolic link to {path.readlink()}, which does not exist; download the "
                "file again, or remove the link if the checkpoint does not need it."
            )


def _visible(folder: Path) -> Iterator[Path]:
    """What lies in a checkpoint's folder, sorted.

    Hidden folders (version control, download caches) and `reap/` (our record of how a source was
    itself pruned) are not part of a checkpoint and are skipped.
    """
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts[:-1])
        if not hidden and parts[0] != RECORD:
            yield path


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str] | None, dict[str, Any]]:
    """Shards to read: the single file if there is one (as transformers prefers), else what the
    index names.
    """
    if is_file(folder / SINGLE_NAME):
        return [SINGLE_NAME], None, {}
    index_path = folder / INDEX_NAME
    if not is_file(index_path):
        raise CheckpointError(
            f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}; "
            "convert the checkpoint to safetensors, or download its safetensors files."
        )
    index = read_json(index_path, "restore the file")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: has no weight_map; restore the file.")
    names = sorted({_inside(index_path, key, name) for key, name in weight_map.items()})
    for name in names:
        if not is_file(folder / name):
            raise CheckpointError(
                f"{folder / name}: missing, though {INDEX_NAME} names it; download it again."
            )
    metadata = index.get("metadata")
    return names, weight_map, metadata if isinstance(metadata, dict) else {}


def _inside(index_path: Path, key: str, name: Any) -> str:
    """A shard name from the index, refused when it is not a plain path below the folder."""
    path = PurePosixPath(name) if isinstance(name, str) and name and "\\" not in name else None
    if (
        path is None
        or path.is_absolute()
        or ".." in path.parts
        or path.suffix != ".safetensors"
        or len(name) > _LONGEST
    ):
        raise CheckpointError(
            f"{index_path}: {short(key, 300)} is said to be in {short(name)}, which is not a "
            "safetensors file inside the folder; correct the index."
        )
    return path.as_posix()


def _check_index(
    folder: Path, shards: tuple[SafetensorsFile, ...], weight_map: dict[str, str] | None
) -> None:
    """Every key of the index is in the shard it names."""
    held = {shard.path: shard.tensors for shard in shards}
    for key, name in (weight_map or {}).items():
        if key not in held[folder / PurePosixPath(name)]:
            raise CheckpointError(
                f"{folder / name}: lacks tensor {key!r}, which {INDEX_NAME} places there; "
                "download index and shards of one and the same checkpoint."
            )


def _check_duplicates(shards: tuple[SafetensorsFile, ...]) -> None:
    """No tensor is in two shards: which one counts would depend on the reader."""
    seen: dict[str, Path] = {}
    for shard in shards:
        for key in shard.tensors:
            if key in seen:
                raise CheckpointError(
                    f"{shard.path}: tensor {key!r} is also in {seen[key].name}; remove one of the "
                    "two."
                )
            seen[key] = shard.path


def _beside(folder: Path, shards: set[Path]) -> dict[Path, Use]:
    """What lies beside the shards, relative to the folder, and what is done with it."""
    found = {}
    for path in _visible(folder):
        relative = path.relative_to(folder)
        ordinary = path.is_dir() and not path.is_symlink()
        if not ordinary and path not in shards and relative.as_posix() not in _REWRITTEN:
            found[relative] = _use(folder, path)
    return found


def _use(folder: Path, path: Path) -> Use:
    if path.name.startswith(".") or is_weight_file(path):
        return Use.LEFT_OUT
    return Use.COPIED if path.is_file() and belongs(folder, path) else Use.REFUSED


def belongs(folder: Path, path: Path) -> bool:
    """Whether a file of a checkpoint's folder is in it, or, as the hub's cache has it, is a link
    from `snapshots/<revision>` to the file in `blobs`.
    """
    root, target = folder.resolve(), path.resolve()
    homes = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    return any(target.is_relative_to(home) for home in homes)
