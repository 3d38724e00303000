"""The journal of a long observation: its statistics and position, from which it can be resumed.

The journal is a folder next to the output. Its `journal.json` contains the identity of the run, the
position, and the names and digests of the files of that position. It is replaced last and
atomically, so a run that is killed at any moment leaves a complete earlier or later position.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.observation.file_digests import check_digests, digests
from reap_driver.observation.resume_file import FIELDS, ResumeFile
from reap_driver.observation.state_store import states_folder
from reap_kernels import SaliencyStats
from reap_kernels.documents import Format, as_read
from reap_kernels.errors import DataError
from reap_kernels.schema import Int, MapOf, OrNull, Text

_NAME = "journal.json"
FORMAT = Format(
    "reap-journal",
    2,
    "journal",
    {
        **FIELDS,
        "position": Int(0, 2**31),
        "stats": Text(),
        "states": OrNull(Text()),
        "files": MapOf(Text()),  # below the folder -> digest
    },
    DataError,
    "resume with the version that wrote it, or delete its folder and run without `resume=True`",
    sealed=True,
)

# Largest share of the time for writing, if no interval is given.
_SHARE = 0.05


@dataclass(frozen=True)
class Entry:
    """The entry of a journal.

    Attributes:
        position: number of finished layers (streamed) or batches (resident).
        seconds: duration of the run so far.
        snapshot: statistics so far.
        states: folder of the batches' hidden states; None for a resident model.
    """

    position: int
    seconds: float
    snapshot: SaliencyStats
    states: Path | None


class Journal:
    """A journal that is being written.

    Args:
        folder: its folder; created by the first write.
        run: identity of the run, JSON-serializable: only a run with the same one can resume.
        every: layers or batches between two entries; None to write as often as takes at most 5 %
            of the time.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], every: int | None = None) -> None:
        self.folder = folder
        self.position = 0
        self._file = _file(folder)
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
        """Writes an entry and deletes the previous one.

        Args:
            position: number of finished layers or batches.
            snapshot: statistics so far.
            states: writes the batches' hidden states to a folder.
            seconds: duration of the run so far.

        Raises:
            ResourceError: the disk is full; the previous entry is kept.
            CheckpointError: the folder cannot be written.
        """
        began = time.monotonic()
        with self._file.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            stats = self.folder / _stats_name(position)
            snapshot.save(stats)
            folder = states_folder(self.folder, position) if states is not None else None
            if states is not None and folder is not None:
                states(folder)
            files = digests(self.folder, [stats, *([] if folder is None else [folder])])
        self._file.write(
            self._run,
            seconds,
            position=position,
            stats=stats.name,
            states=folder.name if folder is not None else None,
            files=files,
        )
        self.position = position
        _delete_others(self.folder, {_NAME, stats.name, folder.name if folder else None})
        self._ended = time.monotonic()
        self._took = self._ended - began

    def resume(self) -> Entry:
        """Reads the entry; later entries continue from it.

        Raises:
            DataError: there is no entry, it is of another run (names the field that differs), or
                its files are damaged.
        """
        content = read(self.folder)
        self._file.check_same(content["run"], self._run)
        stats = self.folder / content["stats"]
        states = None if content["states"] is None else self.folder / content["states"]
        check_digests(
            FORMAT, self.folder, content["files"], [stats, *([] if states is None else [states])]
        )
        snapshot = SaliencyStats.load(stats)
        self.position = content["position"]
        _delete_others(self.folder, {_NAME, content["stats"], content["states"]})
        return Entry(self.position, content["seconds"], snapshot, states)

    def remove(self) -> None:
        """Deletes the journal, after the output was written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read(folder: Path) -> dict[str, Any]:
    """The content of a journal: `run`, `position`, and the names of its files.

    Raises:
        DataError: there is no journal, or it cannot be read.
    """
    content = _file(folder).read()
    position, states = content["position"], content["states"]
    if content["stats"] != _stats_name(position) or states not in (
        None,
        states_folder(folder, position).name,
    ):
        why = f"names files that do not belong to position {position}"
        raise FORMAT.refusal(folder / _NAME, why)
    return content


def exists(folder: Path) -> bool:
    """Whether a folder contains a journal."""
    return _file(folder).exists()


def check_command(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raises DataError unless a journal is of a run that was asked for the same, see `check_same`.

    Args:
        folder: of the journal.
        asked: fields of the run's identity; on others it may differ.
    """
    recorded = read(folder)["run"]
    _file(folder).check_same({field: recorded.get(field) for field in asked}, asked)


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """A lock that keeps other processes from a journal; see `ResumeFile.locked`."""
    return _file(folder).locked()


def _file(folder: Path) -> ResumeFile:
    return ResumeFile(folder / _NAME, FORMAT, folder, "pass `journal=False`")


def _stats_name(position: int) -> str:
    return f"stats-{position:06}.safetensors"


def _delete_others(folder: Path, named: Collection[str | None]) -> None:
    """Deletes the files of entries that `journal.json` does not name."""
    for path in folder.iterdir():
        if path.name in named or not path.name.startswith(("stats-", "states-", f".{_NAME}.")):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
