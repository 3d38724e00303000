"""The journal of a long observation: statistics and position, so that it can go on after its end.

A folder beside the output: `journal.json` says what is observed and how far it is, and names the
files that belong to that position. It is replaced last, so a run killed at any moment leaves either
the position before or the one after, each with all its files.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.streaming.store import states_folder
from reap_kernels import SaliencyStats
from reap_kernels.errors import CheckpointError, DataError, ResourceError
from reap_kernels.files import NO_SPACE, replaced

FORMAT = "reap-journal"
VERSION = 1
_NAME = "journal.json"
_FIELDS: dict[str, Any] = {
    "run": dict,
    "position": int,
    "seconds": int | float,
    "stats": str,
    "states": str | None,
}

# Without an interval given, writing takes at most this share of the time.
_SHARE = 0.05


@dataclass(frozen=True)
class Entry:
    """A position in a journal.

    Attributes:
        position: layers done (streamed) or batches done.
        seconds: the run took up to there.
        snapshot: statistics up to there.
        states: folder of the batches' states, where layers are streamed.
    """

    position: int
    seconds: float
    snapshot: SaliencyStats
    states: Path | None


class Journal:
    """A journal that is being written.

    Args:
        folder: its folder; made when it is first written.
        run: what identifies the run, JSON-serialisable: it can go on where all of it is the same.
        every: layers or batches between two entries; None: as often as costs little time.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], every: int | None = None) -> None:
        self.folder = folder
        self.position = 0
        self._run: dict[str, Any] = json.loads(json.dumps(dict(run)))  # as it is read back
        self._every = every
        self._ended = time.monotonic()
        self._took = 0.0

    def due(self, position: int) -> bool:
        """Whether an entry should be written at this position."""
        if self._every is not None:
            return position - self.position >= self._every
        return self._took <= _SHARE * (time.monotonic() - self._ended)

    def write(
        self,
        position: int,
        snapshot: SaliencyStats,
        states: Callable[[Path], None] | None = None,
        *,
        seconds: float = 0.0,
    ) -> None:
        """Writes an entry and deletes the one before.

        Args:
            position: layers or batches done.
            snapshot: statistics up to there.
            states: writes the batches' states to a folder.
            seconds: the run took up to there.

        Raises:
            ResourceError: the disk is full; the entry before stays.
        """
        began = time.monotonic()
        with _disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            stats = self.folder / f"stats-{position:06}.safetensors"
            snapshot.save(stats)
            named = {stats.name, _NAME}
            if states is not None:
                folder = states_folder(self.folder, position)
                states(folder)
                named.add(folder.name)
            content = {
                "format": FORMAT,
                "version": VERSION,
                "run": self._run,
                "position": position,
                "seconds": round(seconds, 3),
                "stats": stats.name,
                "states": folder.name if states is not None else None,
            }
            with replaced(self.folder / _NAME) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        self.position = position
        _delete_others(self.folder, named)
        self._ended = time.monotonic()
        self._took = self._ended - began

    def resume(self) -> Entry:
        """Reads the entry that is there, and goes on from it.

        Raises:
            DataError: there is none, it is of another run (the field that differs is named), or
                its files are damaged.
        """
        content = read(self.folder)
        check_same(self.folder, content["run"], self._run)
        snapshot = SaliencyStats.load(self.folder / content["stats"])
        states = content["states"]
        self.position = int(content["position"])
        _delete_others(self.folder, {_NAME, content["stats"], states})
        folder = None if states is None else self.folder / states
        return Entry(self.position, float(content["seconds"]), snapshot, folder)

    def remove(self) -> None:
        """Deletes the journal, when what it was kept for is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read(folder: Path) -> dict[str, Any]:
    """The content of a journal: `run`, `position`, and the names of its files.

    Raises:
        DataError: there is no journal, or it cannot be read.
    """
    path = folder / _NAME
    if not path.is_file():
        raise DataError(
            f"{folder}: no journal there, so there is nothing to resume; run without --resume"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        version = content["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a journal ({error!r}); delete {folder} and run without --resume"
        ) from error
    if version != VERSION:
        raise DataError(
            f"{path}: a journal of version {version}, this program writes {VERSION}; "
            f"resume with the version that wrote it, or delete {folder} and start anew"
        )
    for field, kinds in _FIELDS.items():
        if field not in content or not isinstance(content[field], kinds):
            raise DataError(
                f"{path}: {field!r} is {content.get(field, 'missing')!r}; delete {folder} and run "
                "without --resume"
            )
    return dict(content)


def exists(folder: Path) -> bool:
    """Whether a journal that can be resumed is there."""
    return (folder / _NAME).is_file()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from the same journal, by a lock that ends with the process.

    Raises:
        CheckpointError: another process has it.
    """
    path = folder.with_name(folder.name + ".lock")
    with _disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with _disk(folder):
            mine = _lock(descriptor, path)
        if not mine:
            raise CheckpointError(
                f"{folder}: another process is writing this journal; wait for it, or choose "
                "another output"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Locks an open file; false if another process has it, or had and deleted it just now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def check_same(path: Path, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises DataError unless what a journal records of its run is what this run is."""
    for field in dict.fromkeys([*recorded, *now]):
        before, after = recorded.get(field), now.get(field)
        if before != after:
            raise DataError(
                f"{path}: the journal is of another run: {field} was {before!r}, now it is "
                f"{after!r}; give what was given then, or delete it and start anew"
            )


def _delete_others(folder: Path, named: Collection[str | None]) -> None:
    """Deletes entries that `journal.json` does not name."""
    for path in folder.iterdir():
        if path.name in named or not path.name.startswith(("stats-", "states-", f".{_NAME}.")):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Words what a disk may answer."""
    try:
        yield
    except OSError as error:
        full = error.errno in NO_SPACE
        kind = ResourceError if full else CheckpointError
        raise kind(
            f"{folder}: the journal cannot be written ({error.strerror or error}); "
            + ("free some space" if full else "check the folder's rights")
            + ", choose another output, or pass --no-journal"
        ) from error
