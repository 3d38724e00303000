"""Records of calibration data, their readers, and how bad records are skipped and counted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from reap_driver.compat.library_errors import one_line
from reap_kernels.errors import DataError

# Fields about a record's origin or size, which hold no content for a model.
IRRELEVANT = frozenset(
    {"_id", "id", "idx", "index", "uid", "uuid", "instance_id", "__index_level_0__"}
    | {"dataset", "source", "path", "url", "date", "timestamp", "license", "licenses"}
    | {"lang", "language", "length", "num_tokens", "size", "meta", "metadata", "prompt_id"}
    | {"avg_line_length", "max_line_length", "alphanum_fraction", "repository_name"}
    | {"tool_call_id", "tool_call_ids", "cache_control"}  # of messages
)


@dataclass(frozen=True)
class Record:
    """One record of calibration data.

    Attributes:
        place: file and line or row, for error messages.
        fields: name -> value.
        unused: names of fields with content that are not used; the readers, the parser of formats
            and the chat template add to it.
        folder: folder that relative paths in the record refer to; None if it cannot name files.
    """

    place: str
    fields: dict[str, Any]
    unused: set[str] = field(default_factory=set, compare=False)
    folder: Path | None = field(default=None, compare=False)


class BadRecords:
    """Counts bad records, which are skipped.

    As a context manager, it catches and counts a DataError raised inside.

    Attributes:
        count: number of bad records.
        first: error messages of the first few, which name their places.
    """

    SHOWN = 5

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, error: DataError) -> None:
        """Counts one more bad record."""
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
    """Inside, a DataError is counted by `bad`, or raised if that is None."""
    return nullcontext() if bad is None else bad


Chosen = frozenset[int] | None  # numbers of records in a file, from 0; None for all
Numbered = Iterator[tuple[int, Record]]
_Raw = TypeVar("_Raw")


def picked(
    parts: Iterable[_Raw],
    parse: Callable[[int, _Raw], Record],
    chosen: Chosen,
    bad: BadRecords | None,
) -> Numbered:
    """(number, record) of the chosen parts of a file; no other part is parsed.

    Args:
        parts: the parts that are records, such as lines.
        parse: makes a record of a part and its number, counted from 0; raises DataError.
        chosen: numbers of the records to return; None for all.
        bad: collects the errors of bad records, which are skipped; if None, errors are raised.
    """
    left_out = guard(bad)
    for number, part in enumerate(parts):
        if chosen is None or number in chosen:
            record = None
            with left_out:
                record = parse(number, part)
            if record is not None:
                yield number, record


class RecordReader(Protocol):
    """A source of records: local files, or a data set of the hub."""

    def count(self) -> int:
        """Number of records."""

    def read(self, bad: BadRecords | None) -> Iterator[Record]:
        """All records, in order."""

    def pick(self, chosen: Sequence[int], bad: BadRecords | None) -> Iterator[tuple[int, Record]]:
        """(number, record) of the records with the ascending numbers `chosen`, counted from 0."""


def unused(fields: dict[str, Any], used: Iterable[str], inside: str = "") -> set[str]:
    """Names of fields that have content and are not used.

    Args:
        fields: fields of a record or of an object in it; null and empty ones have no content.
        used: names of the fields that are used.
        inside: prefix of the returned names: where in the record the fields are, for example
            `messages[].`.

    Example:
        >>> unused({"text": "a", "id": 1, "summary": "b", "tools": []}, ["text"])
        {'summary'}
    """
    return {
        inside + name
        for name, value in fields.items()
        if name not in used and name not in IRRELEVANT and value not in (None, "", [], {})
    }
