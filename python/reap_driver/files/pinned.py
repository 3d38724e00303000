"""Files as they were when they were inspected, and whether they still are the same.

A checkpoint is read for minutes or hours after its headers were. Whoever replaces a file meanwhile,
even by one of the same size, would otherwise get an output of two checkpoints.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from reap_driver.files.safetensors_file import MAX_HEADER_BYTES
from reap_kernels.errors import CheckpointError

_PREFIX = 8  # bytes that say how long a header is


@dataclass(frozen=True, slots=True)
class Pin:
    """What identifies a file and its content.

    Attributes:
        device, inode: the file, whatever it is called.
        size: bytes.
        modified: time of the last change of its content, nanoseconds.
        header: digest of the header, of safetensors; empty for others.
    """

    device: int
    inode: int
    size: int
    modified: int
    header: str = ""

    def changes(self, other: "Pin") -> str:
        """What differs in another one, in words; empty if nothing does."""
        said = []
        if self.size != other.size:
            said.append(f"it has {other.size} bytes, it had {self.size}")
        if (self.device, self.inode) != (other.device, other.inode):
            said.append("another file has its name")
        if self.modified != other.modified:
            said.append("it was written to")
        if self.header != other.header:
            said.append("its header is another")
        return ", ".join(said)


@dataclass(frozen=True)
class Pins:
    """Pins of the files of a checkpoint; those of other files are not known and not checked."""

    files: Mapping[Path, Pin] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Iterable[Path], shards: Iterable[Path]) -> "Pins":
        """The files as they are now.

        Args:
            files: of any kind.
            shards: safetensors, whose headers are digested.

        Raises:
            CheckpointError: one cannot be read.
        """
        found = {path: _pin(path, header=False) for path in files}
        return cls(found | {path: _pin(path, header=True) for path in shards})

    def with_others(self, others: "Pins") -> "Pins":
        """Both."""
        return Pins({**self.files, **others.files})

    def open(self, path: Path) -> BinaryIO:
        """The file for unbuffered reading.

        Raises:
            CheckpointError: it cannot be read, or is not the file that was inspected.
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
            CheckpointError: it is not the file that was inspected.
        """
        pin = self.files.get(path)
        if pin is not None:
            _compare(path, pin, _of(os.fstat(descriptor), pin.header))

    def check(self) -> None:
        """Checks all files.

        Raises:
            CheckpointError: one is not as it was.
        """
        for path, pin in self.files.items():
            _compare(path, pin, _pin(path, header=bool(pin.header)))


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What is raised for a file of a checkpoint that the system does not let us read."""
    return CheckpointError(
        f"{path}: cannot be read ({error.strerror or error}); check the file and its rights"
    )


def _compare(path: Path, before: Pin, now: Pin) -> None:
    changes = before.changes(now)
    if changes:
        raise CheckpointError(
            f"{path}: changed after it was inspected ({changes}), so what was read is of no one "
            "checkpoint and nothing is written; let nothing write there, and start again"
        )


def _pin(path: Path, *, header: bool) -> Pin:
    try:
        with path.open("rb", buffering=0) as file:
            return _of(os.fstat(file.fileno()), _digest(file) if header else "")
    except OSError as error:
        raise unreadable(path, error) from error


def _of(found: os.stat_result, header: str) -> Pin:
    return Pin(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, header)


def _digest(file: BinaryIO) -> str:
    """Digest of the header of a safetensors file, whatever it may be."""
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
