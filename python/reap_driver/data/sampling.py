"""The records of a source, one after another, or the sample of them that its budget asks for."""

import random
from collections.abc import Iterator
from pathlib import Path

from reap_driver.data.records import BadRecords, Record, RecordReader
from reap_driver.data.source import DataSource
from reap_kernels.errors import DataError

# Records held at once where they come in random order: the first pass, and at most. Each pass reads
# the source once more.
_FIRST_PASS, _LARGEST_PASS = 256, 4096


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
