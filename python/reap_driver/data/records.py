"""A record of calibration data, its readers, and what becomes of bad ones."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from reap_driver.compat.library_errors import one_line
from reap_kernels.errors import DataError

# They say where a record is from or how it was counted, not what a model reads.
IRRELEVANT = frozenset(
    {"_id", "id", "idx", "index", "uid", "uuid", "instance_id", "__index_level_0__"}
    | {"dataset", "source", "path", "url", "date", "timestamp", "license", "licenses"}
    | {"lang", "language", "length", "num_tokens", "size", "meta", "metadata"}
    | {"tool_call_id", "tool_call_ids", "cache_control"}  # of messages
)


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        place: where it stands, as an error message names it.
        fields: what it has.
        folder: where files lie that it names; None where there are none.
        unused: names of fields that nothing is made of, added by whoever passes them over: the
            reader of a table, whoever tells shapes apart, the chat template.
    """

    place: str
    fields: dict[str, Any]
    unused: set[str] = field(default_factory=set, compare=False)
    folder: Path | None = field(default=None, compare=False)


class BadRecords:
    """Counts records that are left out because something is wrong with them.

    As a context manager it takes a DataError raised inside, which then ends there.

    Attributes:
        count: how many.
        first: what is wrong with the first few, each by its place.
    """

    SHOWN = 5

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, error: DataError) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < self.SHOWN:
            self.first.append(one_line(str(error), 1000))

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if isinstance(error, DataError):
            self.add(error)
            return True
        return False


def guard(bad: BadRecords | None) -> AbstractContextManager[None]:
    """Inside it, an error of a record is counted by `bad`, or raised where that is None."""
    return nullcontext() if bad is None else bad


class RecordReader(Protocol):
    """What has records: files, or a data set of the hub."""

    def count(self) -> int:
        """How many there are."""

    def read(self, bad: BadRecords | None) -> Iterator[Record]:
        """All of them, in order."""

    def pick(self, chosen: Sequence[int], bad: BadRecords | None) -> Iterator[tuple[int, Record]]:
        """(number, record) of those with the numbers `chosen`, ascending from 0."""


def unused(fields: dict[str, Any], used: Iterable[str], inside: str = "") -> set[str]:
    """The names of fields that say something and are not used.

    Args:
        fields: of a record, or of an object in it; those that are null or empty say nothing.
        used: names of those that are.
        inside: where in the record they are, such as `messages[].`; begins the names.

    Example:
        >>> unused({"text": "a", "id": 1, "summary": "b", "tools": []}, ["text"])
        {'summary'}
    """
    return {
        inside + name
        for name, value in fields.items()
        if name not in used and name not in IRRELEVANT and value not in (None, "", [], {})
    }
