"""The file a search keeps: every candidate evaluated so far, so that it can be resumed.

Nothing else is needed, for the course of a search follows from its seed and from what it found.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.budget_search.space import Removals
from reap_driver.observation.resume_file import FIELDS, ResumeFile
from reap_kernels.documents import Format, as_read
from reap_kernels.errors import DataError
from reap_kernels.provenance import MAX_EXPERTS
from reap_kernels.schema import Int, ListOf, Real, Record

FORMAT = Format(
    "reap-search",
    2,
    "state of a search",
    {
        **FIELDS,
        "evaluated": ListOf(
            Record({"fitness": Real(low=0), "removed": ListOf(Int(0, MAX_EXPERTS), shortest=1)})
        ),
    },
    DataError,
    "delete it and run without --resume",
    sealed=True,
)


@dataclass(frozen=True)
class Saved:
    """What a state file holds.

    Attributes:
        run: what identifies the search.
        evaluated: every candidate with its fitness, in order.
        seconds: the search took up to there.
    """

    run: dict[str, Any]
    evaluated: dict[Removals, float]
    seconds: float


class SearchState:
    """The state file of one search.

    Args:
        path: of the file.
        run: what identifies the search, JSON-serialisable: it can go on where all of it is the
            same. The number of evaluations is no part of it.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self._run: dict[str, Any] = as_read(dict(run))

    def write(self, evaluated: Mapping[Removals, float], seconds: float) -> None:
        """Replaces the file.

        Args:
            evaluated: every candidate with its fitness, in order.
            seconds: the search took up to there.
        """
        rows = [{"fitness": value, "removed": removals} for removals, value in evaluated.items()]
        _file(self.path).write(self._run, seconds, evaluated=rows)

    def resume(self) -> Saved:
        """What is there, if it is of this search.

        Raises:
            DataError: see `read`; or it is of another search (the field that differs is named).
        """
        saved = read(self.path)
        _file(self.path).check_same(saved.run, self._run)
        return saved

    def remove(self) -> None:
        """Deletes the file, when the plan is written."""
        self.path.unlink(missing_ok=True)


def locked(path: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other processes from a state file, see `ResumeFile.locked`."""
    return _file(path).locked()


def read(path: Path) -> Saved:
    """The content of a state file.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    content = _file(path).read()
    rows = content["evaluated"]
    evaluated = {tuple(row["removed"]): row["fitness"] for row in rows}
    if len({len(removals) for removals in evaluated}) > 1 or len(evaluated) < len(rows):
        why = "has candidates of unlike numbers of layers, or one twice"
        raise FORMAT.refusal(path, why)
    return Saved(content["run"], evaluated, content["seconds"])


def _file(path: Path) -> ResumeFile:
    return ResumeFile(path, FORMAT, path)
