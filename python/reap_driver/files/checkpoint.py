"""Opens a checkpoint folder: finds its files and checks that they agree, before any is used."""

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
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
_LONGEST_NAME = 1000  # characters of a shard's name

# Weights in other formats, and further copies of the weights. They are left out of the output
# because pruning does not change them.
_OTHER_WEIGHTS = frozenset(
    {".bin", ".ckpt", ".ggml", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".onnx_data"}
    | {".ot", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tflite"}
)
_REWRITTEN = frozenset({"config.json", INDEX_NAME, "README.md"})
RECORD = "reap"  # folder of a pruned checkpoint that holds its statistics and plan


class Use(enum.Enum):
    """What happens to a file that is not a shard."""

    COPIED = enum.auto()
    LEFT_OUT = enum.auto()
    REFUSED = enum.auto()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder in Hugging Face format, opened for reading.

    Attributes:
        folder: where its files are; the paths below are relative to it.
        config: config.json as written.
        shards: headers of the weight files, sorted by name.
        small_files: files that are copied to a pruned checkpoint as they are.
        left_out: weights in other formats and hidden files, which are not copied.
        refused: entries that are neither files of the folder nor of the hub's cache; see
            `check_copied`.
        index_metadata: `metadata` of the index of shards; empty without an index.
        fingerprints: of all files that are read, taken before they were read.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[SafetensorsFile, ...]
    small_files: tuple[Path, ...]
    left_out: tuple[Path, ...]
    refused: tuple[Path, ...]
    index_metadata: Mapping[str, Any]
    fingerprints: Fingerprints

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Key -> tensor, over all shards."""
        return {key: entry for shard in self.shards for key, entry in shard.tensors.items()}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def check_copied(self) -> None:
        """Refuses entries that must not be copied: a symbolic link out of the folder, which could
        publish any file of this machine, and pipes or devices, which may never end.

        Raises:
            CheckpointError: names the first such entry and says what it is.
        """
        for path in (self.folder / name for name in self.refused):
            what = "is neither a file nor a folder"
            if path.is_symlink():
                what = f"is a symbolic link to {path.readlink()}, no file of this checkpoint"
            raise CheckpointError(
                f"{path}: {what}, so it is not copied; put a file in its place, or remove it"
            )

    def relative(self, shard: SafetensorsFile) -> str:
        """A shard's path relative to the folder."""
        return shard.path.relative_to(self.folder).as_posix()


def resolve_folder(path_or_id: str | Path) -> Path:
    """The folder of a checkpoint. A hub id is downloaded, or found in the cache; of its weights
    only the safetensors files are.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such model or cannot be
            reached.
    """
    folder = Path(path_or_id)
    if not exists(folder):
        restore(folder.absolute())  # a run may have been killed while replacing this checkpoint
    if exists(folder) and folder.is_dir():
        return folder
    if exists(folder) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_id)):
        raise CheckpointError(f"{path_or_id}: no such folder; give the folder of a checkpoint.")
    from huggingface_hub import snapshot_download

    ignored = [f"*{suffix}" for suffix in sorted(_OTHER_WEIGHTS - {".safetensors"})]
    try:
        return Path(snapshot_download(str(path_or_id), ignore_patterns=ignored))
    except (OSError, ValueError) as error:  # base classes of the hub's errors
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path_or_id}: neither a folder nor a hub id that can be downloaded ({reason})."
        ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the header of every shard and checks that files, index and headers agree.

    Raises:
        CheckpointError: config.json or the weights are missing, the index names files outside the
            folder or does not match the shards, a file is damaged, or a symbolic link is broken.
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
    fingerprints.check()  # nothing changed between the fingerprints and the reading
    left_out = tuple(path for path, use in beside.items() if use is Use.LEFT_OUT)
    refused = tuple(path for path, use in beside.items() if use is Use.REFUSED)
    return Checkpoint(
        folder, config, shards, small, left_out, refused, index_metadata, fingerprints
    )


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object from a file; `remedy` ends the message of an error."""
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
    """Whether a file holds weights, in any format, or is an index of such files."""
    return path.suffix.lower() in _OTHER_WEIGHTS or path.name.endswith(".index.json")


def _check_links(folder: Path) -> None:
    """Raises CheckpointError for a broken symbolic link. The hub's cache consists of links; one
    whose blob is missing would otherwise look like a file that the checkpoint never had.
    """
    for path in _visible(folder):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path}: a symbolic link to {path.readlink()}, which does not exist; download the "
                "file again, or remove the link if the checkpoint does not need it."
            )


def _visible(folder: Path) -> Iterator[Path]:
    """Everything in a checkpoint's folder, at any depth, sorted.

    Skips what is not part of a checkpoint: hidden folders (version control, download caches) and
    `reap/`, which records how the checkpoint was itself pruned.
    """
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts[:-1])
        if not hidden and parts[0] != RECORD:
            yield path


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str] | None, dict[str, Any]]:
    """Names of the shards, the index's `weight_map` and its metadata. A single weight file comes
    before an index, as in transformers; it has no weight map.
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
    places: dict[str, str] = {}  # a shard as the index writes it -> its path; few for many keys
    for key, name in weight_map.items():
        if not isinstance(name, str) or name not in places:
            places[name] = _inside(index_path, key, name)
    names = sorted(set(places.values()))
    for name in names:
        if not is_file(folder / name):
            raise CheckpointError(
                f"{folder / name}: missing, though {INDEX_NAME} names it; download it again."
            )
    metadata = index.get("metadata")
    return names, weight_map, metadata if isinstance(metadata, dict) else {}


def _inside(index_path: Path, key: str, name: Any) -> str:
    """A shard name from the index. Raises CheckpointError unless it is a plain path in the
    folder.
    """
    path = PurePosixPath(name) if isinstance(name, str) and name and "\\" not in name else None
    if (
        path is None
        or path.is_absolute()
        or PureWindowsPath(name).drive
        or ".." in path.parts
        or path.suffix != ".safetensors"
        or len(name) > _LONGEST_NAME
    ):
        raise CheckpointError(
            f"{index_path}: places {short(key, 300)} in {short(name)}, which is not a safetensors "
            "file inside the folder; correct the index."
        )
    return path.as_posix()


def _check_index(
    folder: Path, shards: tuple[SafetensorsFile, ...], weight_map: dict[str, str] | None
) -> None:
    """Raises CheckpointError for a key of the index that is not in the shard the index names."""
    by_path = {shard.path: shard.tensors for shard in shards}
    names = set((weight_map or {}).values())
    held = {name: by_path[folder / PurePosixPath(name)] for name in names}
    for key, name in (weight_map or {}).items():
        if key not in held[name]:
            raise CheckpointError(
                f"{folder / name}: lacks tensor {key!r}, which {INDEX_NAME} places there; "
                "download index and shards of one and the same checkpoint."
            )


def _check_duplicates(shards: tuple[SafetensorsFile, ...]) -> None:
    """Raises CheckpointError for a tensor in two shards: which one is used depends on the
    reader.
    """
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
    """Entries of the folder other than shards and rewritten files, with what happens to each."""
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
    """Whether a path of a checkpoint's folder, with links followed, is inside that folder or, in
    the hub's cache, in the `blobs` folder that `snapshots/<revision>` links to.
    """
    root, target = folder.resolve(), path.resolve()
    homes = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    return any(target.is_relative_to(home) for home in homes)
