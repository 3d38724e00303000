"""The state file of a search: every candidate evaluated so far, so that it can be resumed.

Nothing else is needed, because the seed and the fitness values determine the search.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.observation.resume_file import FIELDS, ResumeFile
from reap_kernels.documents import Format, as_read
from reap_kernels.errors import DataError
from reap_kernels.provenance import MAX_EXPERTS
from reap_kernels.schema import Int, ListOf, Real, Record

# What names a candidate: experts removed by layer, or the experts and neurons that layers keep.
REMOVED, SHAPE = KINDS = ("removed", "shape")
_NUMBER = Int(0, MAX_EXPERTS)
FORMAT = Format(
    "reap-search",
    2,
    "state of a search",
    {
        **FIELDS,
        "evaluated": ListOf(
            Record({"fitness": Real(low=0)}, {kind: ListOf(_NUMBER, shortest=1) for kind in KINDS})
        ),
    },
    DataError,
    "delete it and run without `resume=True`",
    sealed=True,
)


@dataclass(frozen=True)
class Saved:
    """The content of a state file.

    Attributes:
        run: identity of the search.
        evaluated: every candidate with its fitness, in the order of evaluation.
        seconds: duration of the search so far.
    """

    run: dict[str, Any]
    evaluated: dict[tuple[int, ...], float]
    seconds: float


class SearchState:
    """The state file of one search.

    Args:
        path: path of the file.
        run: identity of the search, JSON-serializable: only a search with the same one can resume
            from the file. The number of evaluations is not part of it.
        kind: what names its candidates, one of `KINDS`.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], kind: str = REMOVED) -> None:
        self.path, self._kind = path, kind
        self._run: dict[str, Any] = as_read(dict(run))

    def write(self, evaluated: Mapping[tuple[int, ...], float], seconds: float) -> None:
        """Replaces the file.

        Args:
            evaluated: every candidate with its fitness, in the order of evaluation.
            seconds: duration of the search so far.
        """
        rows = [{"fitness": value, self._kind: named} for named, value in evaluated.items()]
        _file(self.path).write(self._run, seconds, evaluated=rows)

    def resume(self) -> Saved:
        """The saved state.

        Raises:
            DataError: see `read`; or the file is of another search (names the field that differs).
        """
        saved = read(self.path)
        _file(self.path).check_same(saved.run, self._run)
        return saved

    def remove(self) -> None:
        """Deletes the file, after the plan was written."""
        self.path.unlink(missing_ok=True)


def check_command(path: Path, asked: Mapping[str, Any]) -> None:
    """Raises DataError unless a state file is of a search that was asked for the same."""
    recorded = read(path).run
    _file(path).check_same({field: recorded.get(field) for field in asked}, asked)


def locked(path: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other processes from a state file, see `ResumeFile.locked`."""
    return _file(path).locked()


def read(path: Path) -> Saved:
    """The content of a state file.

    Raises:
        DataError: the file does not exist or is damaged.
    """
    content = _file(path).read()
    rows = content["evaluated"]
    named = [[(kind, row[kind]) for kind in KINDS if kind in row] for row in rows]
    if any(len(names) != 1 for names in named) or len({kind for [(kind, _)] in named}) > 1:
        raise FORMAT.refusal(path, f"has candidates not all named by one of {', '.join(KINDS)}")
    known = zip(named, rows, strict=True)
    evaluated = {tuple(numbers): row["fitness"] for [(_, numbers)], row in known}
    if len({len(numbers) for numbers in evaluated}) > 1 or len(evaluated) < len(rows):
        why = "has candidates with different numbers of layers, or the same one twice"
        raise FORMAT.refusal(path, why)
    return Saved(content["run"], evaluated, content["seconds"])


def _file(path: Path) -> ResumeFile:
    return ResumeFile(path, FORMAT, path)
