"""The file from which a long run is resumed after it was interrupted or killed.

It says which run it is of and how far that is. It is replaced in one step, so a run killed at any
moment leaves a file that can be read. A journal (journal.py) has other files beside it; the state
of a search (budget_search/search_state.py) is this file alone.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.base.json_text import json_in_lines
from reap_driver.files.locks import locked
from reap_kernels.documents import Format
from reap_kernels.errors import CheckpointError, DataError, ResourceError
from reap_kernels.files import NO_SPACE, is_file, replaced
from reap_kernels.schema import Flag, Int, Kind, ListOf, Real, Record, Text, short

# Fields of every such file. Of what identifies a run, those that are read before they are compared
# have a kind.
FIELDS: dict[str, Kind] = {
    "run": Record(
        optional={
            "batch sizes": ListOf(Int(1, 2**31)),
            "streamed": Flag(),
            "parked": Text(choices=("device", "host", "file")),
        },
        open=True,
    ),
    "seconds": Real(low=0, high=1e10),
}


@dataclass(frozen=True)
class ResumeFile:
    """The file of one run.

    Attributes:
        path: of the file.
        format: its fields, `FIELDS` among them. Errors call the file what the format does.
        place: what errors name, and what the lock is beside: the file, or the folder it is in.
        otherwise: how to do without it, in words, where that is possible.
    """

    path: Path
    format: Format
    place: Path
    otherwise: str = ""

    def exists(self) -> bool:
        """Whether there is a file."""
        return is_file(self.path)

    def read(self) -> dict[str, Any]:
        """The checked content.

        Raises:
            DataError: there is no file, or it cannot be read.
        """
        if not self.exists():
            raise DataError(
                f"{self.place}: no {self.format.what} there, so there is nothing to resume; run "
                "without --resume"
            )
        return self.format.read(self.path)

    def check_same(self, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Compares what identifies the run of the file with this run, field by field.

        Raises:
            DataError: a field differs; names it, with both values.
        """
        for field in dict.fromkeys([*recorded, *now]):
            before, after = recorded.get(field), now.get(field)
            if before != after:
                raise DataError(
                    f"{self.place}: the {self.format.what} is of another run: {field[:300]} was "
                    f"{short(before, 300)}, now it is {short(after, 300)}; give what was given "
                    "then, or delete it and start anew"
                )

    def write(self, run: Mapping[str, Any], seconds: float, **fields: Any) -> None:
        """Replaces the file.

        Args:
            run: what identifies the run.
            seconds: it took until now, rounded to milliseconds.
            fields: the others of the format.

        Raises:
            CheckpointError, ResourceError: see `writing`; the file before stays.
        """
        content = self.format.complete({"run": run, **fields, "seconds": round(seconds, 3)})
        with self.writing(), replaced(self.path) as temporary:
            temporary.write_text(json_in_lines(content), encoding="utf-8")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns an error of the disk into one that says what to do.

        Raises:
            ResourceError: the disk is full.
            CheckpointError: something else cannot be written.
        """
        try:
            yield
        except OSError as error:
            full = error.errno in NO_SPACE
            kind = ResourceError if full else CheckpointError
            remedies = ["free some space" if full else "check the folder's rights"]
            remedies += ["choose another output", *([self.otherwise] if self.otherwise else [])]
            raise kind(
                f"{self.place}: the {self.format.what} cannot be written "
                f"({error.strerror or error}); {', '.join(remedies[:-1])}, or {remedies[-1]}"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from the file, until the block or this process ends.

        Raises:
            CheckpointError: another process has the lock, or it cannot be made.
        """
        with contextlib.ExitStack() as stack:
            with self.writing():
                self.place.parent.mkdir(parents=True, exist_ok=True)
                lock = self.place.with_name(self.place.name + ".lock")
                mine = stack.enter_context(locked(lock))
            if not mine:
                raise CheckpointError(
                    f"{self.place}: another process is writing this {self.format.what}; wait for "
                    "it, or choose another output"
                )
            yield
