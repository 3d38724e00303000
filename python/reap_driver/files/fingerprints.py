"""Fingerprints of files: detect that a file was changed or replaced after it was inspected.

A checkpoint's weights are read minutes or hours after its headers. If a file is replaced in
between, even by one of the same size, the output would mix two checkpoints.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from reap_driver.files.safetensors_file import MAX_HEADER_BYTES
from reap_kernels.errors import CheckpointError

_PREFIX = 8  # bytes, which hold the length of the header


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identifies a file and its content.

    Attributes:
        device, inode: identify the file independently of its name.
        size: in bytes.
        modified: time of the last change of its content, in nanoseconds.
        header: digest of the header of a safetensors file; empty for other files.
    """

    device: int
    inode: int
    size: int
    modified: int
    header: str = ""

    def changes(self, other: "Fingerprint") -> str:
        """How a later fingerprint differs, for a message; empty if it does not."""
        found = []
        if self.size != other.size:
            found.append(f"it has {other.size} bytes, it had {self.size}")
        if (self.device, self.inode) != (other.device, other.inode):
            found.append("another file has its name")
        if self.modified != other.modified:
            found.append("it was written to")
        if self.header != other.header:
            found.append("its header is another")
        return ", ".join(found)


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of the files of a checkpoint. Other files are not checked."""

    files: Mapping[Path, Fingerprint] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Iterable[Path], shards: Iterable[Path]) -> "Fingerprints":
        """Takes the fingerprints of files.

        Args:
            files: files of any kind.
            shards: safetensors files, whose headers are digested too.

        Raises:
            CheckpointError: a file cannot be read.
        """
        found = {path: _fingerprint(path, header=False) for path in files}
        return cls(found | {path: _fingerprint(path, header=True) for path in shards})

    def with_others(self, others: "Fingerprints") -> "Fingerprints":
        """These fingerprints and others together."""
        return Fingerprints({**self.files, **others.files})

    def open(self, path: Path) -> BinaryIO:
        """Opens a file for unbuffered reading.

        Raises:
            CheckpointError: it cannot be read, or has changed since its fingerprint was taken.
        """
        try:
            file = path.open("rb", buffering=0)
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            self.check_open(path, file.fileno())
        except BaseException:
            file.close()
            raise
        return file

    def check_open(self, path: Path, descriptor: int) -> None:
        """Checks a file that was just opened.

        Raises:
            CheckpointError: it has changed since its fingerprint was taken.
        """
        known = self.files.get(path)
        if known is not None:
            _compare(path, known, _of(os.fstat(descriptor), known.header))

    def check(self) -> None:
        """Checks all files.

        Raises:
            CheckpointError: one has changed since its fingerprint was taken.
        """
        for path, known in self.files.items():
            _compare(path, known, _fingerprint(path, header=bool(known.header)))


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file of a checkpoint that the system cannot read."""
    return CheckpointError(
        f"{path}: cannot be read ({error.strerror or error}); check the file and its permissions"
    )


def _compare(path: Path, before: Fingerprint, now: Fingerprint) -> None:
    changes = before.changes(now)
    if changes:
        raise CheckpointError(
            f"{path}: changed after it was inspected ({changes}), so the data read may mix two "
            "checkpoints and is not used; make sure that nothing writes there, and start again"
        )


def _fingerprint(path: Path, *, header: bool) -> Fingerprint:
    try:
        with path.open("rb", buffering=0) as file:
            return _of(os.fstat(file.fileno()), _digest(file) if header else "")
    except OSError as error:
        raise unreadable(path, error) from error


def _of(found: os.stat_result, header: str) -> Fingerprint:
    return Fingerprint(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, header)


def _digest(file: BinaryIO) -> str:
    """Digest of the header of a safetensors file, which need not be valid."""
    prefix = file.read(_PREFIX)
    length = min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES)
    digest = hashlib.sha256(prefix)
    while length:
        piece = file.read(min(length, 1 << 20))
        if not piece:
            break
        digest.update(piece)
        length -= len(piece)
    return digest.hexdigest()
