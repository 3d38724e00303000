"""Tokenised sources kept on disk, for the next run on the same data.

An entry is found by what its tokens depend on: the content of the data and of the tokenizer's
files, the options, the versions of the libraries and of this code. It is one safetensors file with
a digest of what it holds; one that is damaged is made again, and it is said.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

import reap_kernels
from reap_driver.calibration.encode import Encoder
from reap_driver.calibration.packing import PackedSource, Packing, pack
from reap_driver.calibration.records import BadRecords
from reap_driver.calibration.source import DataSource
from reap_kernels import env
from reap_kernels.errors import DataError
from reap_kernels.files import replaced, save_tensors

FORMAT = "reap-tokens"

# Seconds of work that are worth a file, and bytes that all files may take: the oldest go.
_WORTH = 1.0
_LIMIT = 4 * 2**30

# Files of a model's folder that a tokenizer may read; config.json has the end of a sequence.
_TOKENIZER = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
_TENSORS = ("ids", "starts", "counted", "given")


@dataclass(frozen=True)
class Cache:
    """The tokens of one model's tokenizer.

    Args:
        model: its folder; a hub id's, where its files are.
        options: of the encoder, JSON-serialisable.
        note: told what a user should know.
    """

    model: Path
    options: Mapping[str, Any]
    note: Callable[[str], object] = field(default=lambda _: None, compare=False)

    def pack(
        self,
        source: DataSource,
        encoder: Encoder,
        *,
        seq_len: int,
        seed: int,
        packing: Packing,
        skip_bad: bool,
        progress: Callable[[int], None] | None = None,
    ) -> PackedSource:
        """What `pack` makes of these arguments, from the cache where it is there.

        Raises:
            DataError: of `pack`.
        """
        longest = seq_len if packing == "none" else None
        path = self._path(source, seed=seed, longest=longest, skip_bad=skip_bad)
        kept = None if path is None else self._load(path)
        if kept is not None:
            made = PackedSource(source=source, seq_len=seq_len, seed=seed, packing=packing, **kept)
            if progress is not None:
                progress(made.tokens)
            return made
        began = time.monotonic()
        made = pack(
            source,
            encoder,
            seq_len=seq_len,
            seed=seed,
            packing=packing,
            skip_bad=skip_bad,
            progress=progress,
        )
        if path is not None and time.monotonic() - began >= _WORTH:
            self._save(path, made)
        return made

    def _path(self, source: DataSource, **options: Any) -> Path | None:
        """The file of an entry; None where what it depends on cannot be known beforehand."""
        data = _data_digest(source)
        if data is None:
            return None
        key = {
            "data": data,
            "source": [source.name, source.samples, source.tokens, source.tools],
            "tokenizer": _files_digest(_tokenizer_files(self.model)),
            **self.options,
            **options,
            "versions": _versions(),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return env.cache_dir() / "tokens" / f"{digest}.safetensors"

    def _load(self, path: Path) -> dict[str, Any] | None:
        """The fields of a packed source; None where there is no entry, or a damaged one."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()[FORMAT])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if facts["digest"] != _digest(tensors):
                raise ValueError("its digest is another")
            os.utime(path)  # it is of use: let it not be the oldest
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            self.note(f"{path}: damaged ({error}), so the data are tokenised again")
            return None
        bad = None
        if facts["skipped"] is not None:
            bad = BadRecords()
            bad.count, bad.first = facts["skipped"]
        return {
            **{name: tensors.get(name) for name in _TENSORS},
            **{name: facts[name] for name in ("records", "separator", "truncated", "unused")},
            "skipped": bad,
        }

    def _save(self, path: Path, made: PackedSource) -> None:
        """Adds an entry; that it cannot be kept is said, and is no error."""
        tensors = {
            name: tensor for name in _TENSORS if isinstance(tensor := getattr(made, name), Tensor)
        }
        bad = made.skipped
        facts = {
            "digest": _digest(tensors),
            "records": made.records,
            "separator": made.separator,
            "truncated": made.truncated,
            "unused": list(made.unused),
            "skipped": None if bad is None else [bad.count, bad.first],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_room(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
            with replaced(path) as temporary:
                save_tensors(tensors, temporary, {FORMAT: json.dumps(facts)})
        except OSError as error:
            self.note(
                f"{path}: the tokens cannot be kept ({error.strerror or error}); set "
                "REAP_CACHE_DIR to a folder that can be written, or pass --no-cache"
            )


def _data_digest(source: DataSource) -> str | None:
    """Of the content of local files, or the name of a commit on the hub; None for a branch."""
    location = source.location
    if isinstance(location, Path):
        try:
            return _files_digest(_visible(location) if location.is_dir() else [location])
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"data {error.filename} cannot be read: {reason}") from error
    pinned = location.revision is not None and re.fullmatch(r"[0-9a-f]{40}", location.revision)
    return repr(location) if pinned else None


def _visible(folder: Path) -> Iterator[Path]:
    """All files in a folder that are not hidden."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _tokenizer_files(model: Path) -> list[Path]:
    """Those of a model's folder; that of another name may be one too, and costs another entry."""
    folders = [model, model / "additional_chat_templates"]
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    return [
        path
        for path in found
        if path.suffix in _TOKENIZER and not path.name.endswith(".index.json") and path.is_file()
    ]


def _files_digest(paths: Iterator[Path] | list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(
                f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode()
            )
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of the bytes of tensors, and their names and lengths."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{len(tensor)};".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    """Of everything that has a part in making tokens; of this package, its code."""
    return {
        "reap_kernels": reap_kernels.__version__,
        "code": _files_digest(sorted(Path(__file__).parent.glob("*.py"))),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _make_room(folder: Path, needed: int) -> None:
    """Deletes the entries longest unused, until `needed` more bytes are within the limit."""
    entries = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    total = needed + sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= _LIMIT:
            break
        path.unlink(missing_ok=True)
        total -= size
