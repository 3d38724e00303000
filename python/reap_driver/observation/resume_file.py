"""The file from which a long run is resumed after it was interrupted or killed.

It contains the identity of the run and its progress. It is replaced atomically, so a run that is
killed at any moment leaves a readable file. A journal (journal.py) has further files; the state of
a search (plan_search/search_state.py) is only this file.
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

# Fields of every such file. Of a run's identity, those that are read before the identities are
# compared have a kind.
FIELDS: dict[str, Kind] = {
    "run": Record(
        optional={
            "batch sizes": ListOf(Int(1, 2**31)),
            "streamed": Flag(),
            "offload": Text(choices=("device", "host", "file")),
        },
        open=True,
    ),
    "seconds": Real(low=0, high=1e10),
}


def difference(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first field in which the identities of two runs differ, with both values; None if none.

    Example:
        >>> difference({"seed": 0}, {"seed": 3})
        'seed was 0, now it is 3'
    """
    for field in dict.fromkeys([*recorded, *now]):
        before, after = recorded.get(field), now.get(field)
        if before != after:
            return f"{field[:300]} was {short(before, 300)}, now it is {short(after, 300)}"
    return None


@dataclass(frozen=True)
class ResumeFile:
    """The file from which one run is resumed.

    Attributes:
        path: path of the file.
        format: its fields, `FIELDS` among them, and the name of the file in errors.
        place: the path that errors name, and that the lock is next to: the file, or its folder.
        otherwise: how to run without the file, in words; empty if that is not possible.
    """

    path: Path
    format: Format
    place: Path
    otherwise: str = ""

    def exists(self) -> bool:
        """Whether the file exists."""
        return is_file(self.path)

    def read(self) -> dict[str, Any]:
        """The checked content.

        Raises:
            DataError: the file does not exist, or cannot be read.
        """
        if not self.exists():
            raise DataError(
                f"{self.place}: there is no {self.format.what}, so nothing to resume; run without "
                "`resume=True`, or with `resume='auto'`, which begins where there is none"
            )
        return self.format.read(self.path)

    def check_same(self, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Compares the identity of the file's run with that of this run, field by field.

        Raises:
            DataError: a field differs; names it, with both values.
        """
        differs = difference(recorded, now)
        if differs is not None:
            raise DataError(
                f"{self.place}: the {self.format.what} is of another run: {differs}; use the same "
                "arguments as then, or delete it and start again"
            )

    def write(self, run: Mapping[str, Any], seconds: float, **fields: Any) -> None:
        """Replaces the file.

        Args:
            run: identity of the run.
            seconds: duration of the run so far; rounded to milliseconds.
            fields: the other fields of the format.

        Raises:
            CheckpointError, ResourceError: see `writing`; the previous file is kept.
        """
        content = self.format.complete({"run": run, **fields, "seconds": round(seconds, 3)})
        with self.writing(), replaced(self.path) as temporary:
            temporary.write_text(json_in_lines(content), encoding="utf-8")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns errors of the file system into errors with a remedy.

        Raises:
            ResourceError: the disk is full.
            CheckpointError: any other error.
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
        """Keeps other processes from the file until the block or this process ends.

        Raises:
            CheckpointError: another process has the lock, or the lock cannot be created.
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
