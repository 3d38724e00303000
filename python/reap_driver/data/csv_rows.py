"""Reads records from CSV and TSV files, whose first row names the fields."""

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from reap_driver.compat.library_errors import one_line
from reap_driver.data.compressed_files import LARGEST, inner_suffix, opened
from reap_driver.data.record_formats import FIELDS, known_formats
from reap_driver.data.records import BadRecords, Chosen, Numbered, Record, picked
from reap_kernels.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def count_rows(file: Path) -> int:
    """Number of rows below the first, without empty ones."""
    return sum(1 for _ in _rows(file))


def read_rows(file: Path, chosen: Chosen, bad: BadRecords | None) -> Numbered:
    """(number, record) of the rows below the first; empty cells count as absent.

    Args:
        file: a .csv or .tsv file, compressed or not.
        chosen: numbers of the rows to return; None for all.
        bad: collects the errors of bad rows, which are skipped; if None, errors are raised.

    Raises:
        DataError: the file cannot be read or has no row of names, or a row has another number of
            cells; names file and line.
    """

    def parse(_: int, part: tuple[str, dict[str, str] | DataError]) -> Record:
        place, row = part
        if isinstance(row, DataError):
            raise row
        return Record(place, {k: v for k, v in row.items() if v}, folder=file.parent)

    return picked(_rows(file), parse, chosen, bad)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, str] | DataError]]:
    """(place, cells by name, or what is wrong) of each row."""
    if csv.field_size_limit() < LARGEST:  # of the process; 131,072 unless somebody set it
        csv.field_size_limit(LARGEST)
    with opened(file) as stream:
        lines = _Lines(file, stream)
        reader = csv.reader(lines, delimiter=DELIMITERS[inner_suffix(file)], strict=True)
        names = _names(file, reader)
        while True:
            lines.start()
            place = f"{file}:{reader.line_num + 1}"
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield place, DataError(f"{place}: is not CSV ({error}); correct its quotes")
                continue
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(names):
                yield (
                    place,
                    DataError(
                        f"{place}: has {len(row)} cells, and the first row {len(names)}; quote "
                        "cells that hold the separator"
                    ),
                )
                continue
            yield place, {name: cell for name, cell in zip(names, row, strict=True) if name}


def _names(file: Path, reader: Iterator[list[str]]) -> list[str]:
    """The names of fields in the first row. One may be empty: pandas writes its index so."""
    try:
        names = [name.strip() for name in next((row for row in reader if row), [])]
    except csv.Error as error:
        raise DataError(f"data {file}: its first row is not CSV ({error}); correct it") from error
    if not FIELDS.intersection(names):
        has = one_line(", ".join(names), 200) if any(names) else "nothing"
        raise DataError(
            f"data {file}: its first row names no field of a known format, which are "
            f"{known_formats()} (it has {has}); give it a first row of names"
        )
    twice = [name for name in set(names) - {""} if names.count(name) > 1]
    if twice:
        raise DataError(f"data {file}: its first row has {one_line(twice[0])} twice; rename one")
    return names


class _Lines:
    """The lines of a file as text; a row of several lines has at most `LARGEST` bytes."""

    def __init__(self, file: Path, stream: IO[bytes]) -> None:
        self._file, self._stream = file, stream
        self._number = self._size = 0

    def start(self) -> None:
        """A row begins."""
        self._size = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(LARGEST + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self._size += len(line)
        if self._size > LARGEST:
            raise DataError(
                f"{self._file}:{self._number}: its row is larger than {LARGEST} bytes; divide it, "
                "or close its quotes"
            )
        if self._number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._file}:{self._number}: is not UTF-8 ({error.reason}); convert the file"
            ) from error
