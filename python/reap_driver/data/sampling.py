"""Reads the records of a source, or a random sample of them if it has a budget."""

import random
from collections.abc import Iterator
from pathlib import Path

from reap_driver.data.records import BadRecords, Record, RecordReader
from reap_driver.data.source import DataSource
from reap_kernels.errors import DataError

# Records in memory at once when they are read in random order: in the first pass, and at most. Each
# pass reads the source again.
_FIRST_PASS, _LARGEST_PASS = 256, 4096


def read_records(source: DataSource, seed: int, bad: BadRecords | None = None) -> Iterator[Record]:
    """The records of a source, or a random sample of them if it has a budget.

    With a budget of records: a random sample, in the order of the source. With a budget of tokens:
    the records in random order, so that the caller gets a random sample by stopping at the budget;
    each pass over the source reads up to 4096 of them. In both cases the records are counted first
    and only those that are drawn are parsed.

    Args:
        source: the source to read.
        seed: equal seeds draw equal samples.
        bad: collects the errors of bad records, which are skipped; if None, errors are raised.

    Raises:
        DataError: there are no records, the source cannot be read, or a record is malformed; names
            file and line.
    """
    reader, found = _reader(source), False
    for record in _sampled(reader, source, seed, bad):
        found = True
        yield source.completed(record)
    if not found and not (bad and bad.count):
        raise DataError(f"data {source.name} holds no records; give data with at least one")


def all_records(source: DataSource, bad: BadRecords | None = None) -> Iterator[Record]:
    """All records of a source, in order, whatever its budget.

    Raises:
        DataError: see `read_records`.
    """
    return (source.completed(record) for record in _reader(source).read(bad))


def _reader(source: DataSource) -> RecordReader:
    if isinstance(source.location, Path):
        from reap_driver.data.local_files import Files

        return Files(source.location)
    from reap_driver.data.hub import HubRows

    return HubRows(source.location)


def _sampled(
    reader: RecordReader, source: DataSource, seed: int, bad: BadRecords | None
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
