"""The file a search keeps: every candidate evaluated so far, so that it can go on after its end.

That is all there is to keep, for the course of a search follows from its seed and from what it
found. The file is replaced at once, so a search killed at any moment leaves one that can be read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.journal import check_same
from reap_driver.search.space import Removals
from reap_kernels.errors import DataError
from reap_kernels.files import replaced

FORMAT = "reap-search"
VERSION = 1


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
        self._run: dict[str, Any] = json.loads(json.dumps(dict(run)))  # as it is read back

    def write(self, evaluated: Mapping[Removals, float], seconds: float) -> None:
        """Replaces the file.

        Args:
            evaluated: every candidate with its fitness, in order.
            seconds: the search took up to there.
        """
        head = {"format": FORMAT, "version": VERSION, "seconds": round(seconds, 3)}
        lines = [json.dumps([value, *removals]) for removals, value in evaluated.items()]
        text = json.dumps({**head, "run": self._run}, indent=2)[:-2]
        text += ',\n  "evaluated": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"
        with replaced(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def resume(self) -> Saved:
        """What is there, if it is of this search.

        Raises:
            DataError: see `read`; or it is of another search (the field that differs is named).
        """
        saved = read(self.path)
        check_same(self.path, saved.run, self._run)
        return saved

    def remove(self) -> None:
        """Deletes the file, when the plan is written."""
        self.path.unlink(missing_ok=True)


def read(path: Path) -> Saved:
    """The content of a state file.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no state of a search there, so there is nothing to resume; run without "
            "--resume"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = (content["format"], content["version"])
        if known != (FORMAT, VERSION):
            raise ValueError(f"format and version are {known}, not {(FORMAT, VERSION)}")
        rows = content["evaluated"]
        evaluated = {tuple(map(int, row[1:])): float(row[0]) for row in rows}
        return Saved(dict(content["run"]), evaluated, float(content["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: not the state of a search ({error!r}); delete it and run without --resume"
        ) from error
