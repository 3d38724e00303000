"""The records of a source, one after another, or the sample of them that its budget asks for."""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from reap_driver.calibration.source import DataSource
from reap_driver.compat.foreign import one_line
from reap_kernels.errors import DataError

# Records held at once where they come in random order: the first pass, and at most. Each pass reads
# the source once more.
_FIRST_PASS, _LARGEST_PASS = 256, 4096


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


class Reader(Protocol):
    """What has records: files, or a data set of the hub."""

    def count(self) -> int:
        """How many there are."""

    def read(self, bad: BadRecords | None) -> Iterator[Record]:
        """All of them, in order."""

    def pick(self, chosen: Sequence[int], bad: BadRecords | None) -> Iterator[tuple[int, Record]]:
        """(number, record) of those with the numbers `chosen`, ascending from 0."""


def read_records(source: DataSource, seed: int, bad: BadRecords | None = None) -> Iterator[Record]:
    """The records of a source, or the sample of them that its budget asks for.

    For a number of records: a random sample, in the order of the source. For a number of tokens:
    all (or that many) in random order, so that whoever stops at the budget has a random sample; a
    pass over the source brings up to 4096 of them. Either counts the records first, and parses only
    those drawn.

    Args:
        source: what to read.
        seed: equal seeds draw equal samples.
        bad: takes malformed records, which are left out; None raises their error.

    Raises:
        DataError: no data, a source nobody reads, or a malformed record, by file and line.
    """
    reader, found = _reader(source), False
    for record in _sampled(reader, source, seed, bad):
        found = True
        if source.tools is not None and not record.fields.get("tools"):
            record.fields["tools"] = source.tools
        yield record
    if not found and not (bad and bad.count):
        raise DataError(f"data {source.name} holds no records; give data with at least one")


def _reader(source: DataSource) -> Reader:
    if isinstance(source.location, Path):
        from reap_driver.calibration.files import Files

        return Files(source.location)
    from reap_driver.calibration.hub import HubRows

    return HubRows(source.location)


def _sampled(
    reader: Reader, source: DataSource, seed: int, bad: BadRecords | None
) -> Iterator[Record]:
    if source.samples is None and source.tokens is None:
        yield from reader.read(bad)
        return
    total = reader.count()
    drawn = total if source.samples is None else min(total, source.samples)
    if source.tokens is None and drawn == total:
        yield from reader.read(bad)
        return
    order = random.Random(seed).sample(range(total), drawn)
    if source.tokens is None:
        yield from (record for _, record in reader.pick(sorted(order), bad))
        return
    start, size = 0, _FIRST_PASS
    while part := order[start : start + size]:
        records = dict(reader.pick(sorted(part), bad))
        yield from (records[number] for number in part if number in records)
        start, size = start + size, min(2 * size, _LARGEST_PASS)
