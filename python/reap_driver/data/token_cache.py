"""Caches tokenized sources on disk, for later runs on the same data.

The key of an entry is a digest of everything that its tokens depend on: the content of the data and
of the tokenizer's files, the options, the versions of the libraries and of this code. An entry is
one safetensors file, with an HMAC of its content and name. A damaged entry, or one that this user's
runs did not write, is replaced, and the user is told.

The HMAC's key is in a file beside the entries that only this user may read. So entries that another
user put into a shared folder, or that were copied from elsewhere, are rejected. An attacker who can
write as this user is not excluded; they could change the program too.
"""

import contextlib
import errno
import functools
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import reap_kernels
from reap_driver.compat.library_errors import one_line
from reap_driver.data.encode import Encoder
from reap_driver.data.packing import PackedSource, Packing, pack
from reap_driver.data.records import BadRecords
from reap_driver.data.source import DataSource
from reap_kernels import env
from reap_kernels.documents import open_file
from reap_kernels.errors import DataError
from reap_kernels.files import is_file, replaced, save_tensors

FORMAT = "reap-tokens-3"

# Seconds of work above which a result is cached, and the maximum bytes of all entries, beyond which
# the least recently used ones are deleted.
_WORTH = 1.0
_LIMIT = 4 * 2**30

# Files that a tokenizer may read; config.json has the end-of-sequence id.
_TOKENIZER = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
_KEY_BYTES = 32
_FACTS = ("records", "separator", "truncated", "unused", "chat_template")
_TENSORS = ("ids", "starts", "counted", "given")


@dataclass(frozen=True)
class Cache:
    """A cache of sources tokenized for one model.

    Args:
        model: folder of the model's files.
        options: options of the encoder, as JSON values.
        note: called with messages for the user.
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
        """The result of `pack` for these arguments, from the cache if it has an entry.

        Raises:
            DataError: see `pack`.
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
        # Sources with images are not cached: image files are not part of the key.
        if path is not None and not made.image_inputs and time.monotonic() - began >= _WORTH:
            self._save(path, made)
        return made

    def _path(self, source: DataSource, **options: Any) -> Path | None:
        """The file of an entry; None if the data can change without a change of the key."""
        data = _data_digest(source)
        if data is None:
            return None
        key = {
            "data": data,
            "source": [source.name, source.samples, source.tokens, source.tools],
            "tokenizer": _files_digest(_tokenizer_files(self.model), "tokenizer file"),
            **self.options,
            **options,
            "versions": _versions(),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return env.cache_dir() / "tokens" / f"{digest}.safetensors"

    def _load(self, path: Path) -> dict[str, Any] | None:
        """The fields of a packed source; None if there is no entry or it is damaged."""
        if not is_file(path):
            return None
        try:
            key = _key(path.parent)
            if path.stat().st_size > _LIMIT:
                raise ValueError("it is larger than the limit of all entries")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = _digest(key, path.stem, metadata[FORMAT], tensors)
            if not hmac.compare_digest(written, metadata["digest"]):
                raise ValueError("its digest does not match this user's key and its content")
            os.utime(path)  # marks it as recently used
        except Exception as error:  # noqa: BLE001  libraries raise anything on a damaged file
            self.note(f"{path}: damaged ({one_line(error)}), so the data is tokenized again")
            return None
        facts = json.loads(metadata[FORMAT])
        bad = None
        if facts["skipped"] is not None:
            bad = BadRecords()
            bad.count, bad.first = facts["skipped"]
        return {
            **{name: tensors.get(name) for name in _TENSORS},
            **{name: facts[name] for name in _FACTS},
            "skipped": bad,
        }

    def _save(self, path: Path, made: PackedSource) -> None:
        """Writes an entry. If that fails, the user is told and the run continues."""
        tensors = {
            name: tensor for name in _TENSORS if isinstance(tensor := getattr(made, name), Tensor)
        }
        bad = made.skipped
        facts = {
            **{name: getattr(made, name) for name in _FACTS},
            "skipped": None if bad is None else [bad.count, bad.first],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(facts)
            digest = _digest(_key(path.parent), path.stem, text, tensors)
            _make_room(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
            with replaced(path) as temporary:
                save_tensors(tensors, temporary, {FORMAT: text, "digest": digest})
        except OSError as error:
            self.note(
                f"{path}: the tokens cannot be cached ({error.strerror or error}); set "
                "REAP_CACHE_DIR to a folder that can be written, or pass `cache=False`"
            )


def _data_digest(source: DataSource) -> str | None:
    """Digest of the content of local files, or name and commit of a hub data set; None if
    the data set has no fixed commit.
    """
    location = source.location
    if isinstance(location, Path):
        return _files_digest(_visible(location) if location.is_dir() else [location], "data")
    pinned = location.revision is not None and re.fullmatch(r"[0-9a-f]{40}", location.revision)
    return repr(location) if pinned else None


def _visible(folder: Path) -> Iterator[Path]:
    """All files in a folder, at any depth, that are not hidden."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and is_file(path):
            yield path


def _tokenizer_files(model: Path) -> list[Path]:
    """Files in a model's folder that a tokenizer may read. A file too many only costs
    another entry.
    """
    folders = [model, model / "additional_chat_templates"]
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    return [
        path
        for path in found
        if path.suffix in _TOKENIZER and not path.name.endswith(".index.json") and is_file(path)
    ]


def _files_digest(paths: Iterator[Path] | list[Path], what: str) -> str:
    """Digest of the names and contents of files.

    Raises:
        DataError: one cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in paths:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name}:{content};".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise DataError(
            f"{what} {error.filename} cannot be read: {error.strerror or error}"
        ) from error
    return digest.hexdigest()


def _digest(key: bytes, name: str, facts: str, tensors: Mapping[str, Tensor]) -> str:
    """HMAC over an entry's name, its facts, and the names, lengths and bytes of its tensors."""
    digest = hmac.new(key, f"{name};{len(facts)}:{facts};".encode(), "sha256")
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{len(name)}:{name}:{tensor.dtype}:{len(tensor)};".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(folder: Path) -> bytes:
    """The HMAC key of a folder, created if there is none.

    Raises:
        OSError: it cannot be read or created, or other users can read it.
    """
    path = folder / "key"
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".key.")  # private
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        os.replace(temporary, path)
    with open_file(path, follow=False) as file:
        if not _private(os.fstat(file.fileno())):
            raise PermissionError(errno.EPERM, f"{path} is not private to this user")
        key = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise OSError(errno.EIO, f"{path} is no key; remove it")
    return key


def _private(facts: os.stat_result) -> bool:
    """Whether this user owns an open file, and no other user may read or write it. Windows does not
    say so; the default folder, in the user's own, is closed to others there.
    """
    if not hasattr(os, "geteuid"):
        return True
    return facts.st_uid == os.geteuid() and not facts.st_mode & 0o077


@functools.cache
def _versions() -> dict[str, str]:
    """Versions of everything that affects tokens; for this package, a digest of its code."""
    return {
        "reap_kernels": reap_kernels.__version__,
        "code": _files_digest(sorted(Path(__file__).parent.glob("*.py")), "module"),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _make_room(folder: Path, needed: int) -> None:
    """Deletes the least recently used entries until `needed` more bytes are within the limit."""
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
