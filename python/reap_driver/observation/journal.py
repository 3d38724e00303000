"""The journal of a long observation: statistics and position, so that it can go on after its end.

A folder beside the output: `journal.json` says what is observed and how far it is, and names the
files that belong to that position, with their digests. It is replaced last, so a run killed at any
moment leaves either the position before or the one after, each with all its files.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.observation.state_store import states_folder
from reap_kernels import SaliencyStats
from reap_kernels.documents import Format, as_read, open_file, to_json
from reap_kernels.errors import CheckpointError, DataError, ResourceError
from reap_kernels.files import NO_SPACE, is_file, replaced
from reap_kernels.schema import Flag, Int, ListOf, MapOf, OrNull, Real, Record, Text, short

_NAME = "journal.json"
# Of what identifies a run, the fields that are read before they are compared.
RUN = Record(
    optional={
        "batch sizes": ListOf(Int(1, 2**31)),
        "streamed": Flag(),
        "parked": Text(choices=("device", "host", "file")),
    },
    open=True,
)
FORMAT = Format(
    "reap-journal",
    2,
    "journal",
    {
        "run": RUN,
        "position": Int(0, 2**31),
        "seconds": Real(low=0, high=1e10),
        "stats": Text(),
        "states": OrNull(Text()),
        "files": MapOf(Text()),  # below the folder -> digest
    },
    DataError,
    "resume with the version that wrote it, or delete its folder and run without --resume",
    sealed=True,
)

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
        self._run: dict[str, Any] = as_read(dict(run))
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
            stats = self.folder / _stats_name(position)
            snapshot.save(stats)
            folder = states_folder(self.folder, position) if states is not None else None
            if states is not None and folder is not None:
                states(folder)
            content = {
                "run": self._run,
                "position": position,
                "seconds": round(seconds, 3),
                "stats": stats.name,
                "states": folder.name if folder is not None else None,
                "files": _digests(self.folder, stats, folder),
            }
            with replaced(self.folder / _NAME) as temporary:
                text = to_json(FORMAT.complete(content), indent=2)
                temporary.write_text(text + "\n", encoding="utf-8")
        self.position = position
        _delete_others(self.folder, {_NAME, stats.name, folder.name if folder else None})
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
        stats = self.folder / content["stats"]
        states = None if content["states"] is None else self.folder / content["states"]
        _check_files(self.folder, content["files"], stats, states)
        snapshot = SaliencyStats.load(stats)
        self.position = content["position"]
        _delete_others(self.folder, {_NAME, content["stats"], content["states"]})
        return Entry(self.position, content["seconds"], snapshot, states)

    def remove(self) -> None:
        """Deletes the journal, when what it was kept for is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read(folder: Path) -> dict[str, Any]:
    """The content of a journal: `run`, `position`, and the names of its files.

    Raises:
        DataError: there is no journal, or it cannot be read.
    """
    path = folder / _NAME
    if not is_file(path):
        raise DataError(
            f"{folder}: no journal there, so there is nothing to resume; run without --resume"
        )
    content = FORMAT.read(path)
    position, states = content["position"], content["states"]
    if content["stats"] != _stats_name(position) or states not in (
        None,
        states_folder(folder, position).name,
    ):
        raise FORMAT.refusal(path, f"names files that are not those of position {position}")
    return content


def exists(folder: Path) -> bool:
    """Whether a journal that can be resumed is there."""
    return is_file(folder / _NAME)


def _stats_name(position: int) -> str:
    return f"stats-{position:06}.safetensors"


def _digests(folder: Path, stats: Path, states: Path | None) -> dict[str, str]:
    """`sha256:...` of the files of an entry, by their names below the folder.

    Raises:
        OSError: one of them cannot be read.
    """
    found = {}
    for path in [stats, *(sorted(states.iterdir()) if states is not None else ())]:
        with open_file(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = f"sha256:{digest}"
    return found


def _check_files(
    folder: Path, recorded: Mapping[str, str], stats: Path, states: Path | None
) -> None:
    """Raises DataError unless the files of an entry are those that were written."""
    try:
        found = _digests(folder, stats, states)
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
        raise FORMAT.refusal(error.filename or folder, why) from error
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            why = "is missing" if name not in found else "is damaged, or of another run"
            raise FORMAT.refusal(folder / name, why)


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
                f"{path}: the journal is of another run: {field[:300]} was {short(before, 300)}, "
                f"now it is {short(after, 300)}; give what was given then, or delete it and start "
                "anew"
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
