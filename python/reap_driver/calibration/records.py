"""Records of calibration files, one after another, each with the place it stands at.

| ending | a record is |
|---|---|
| .jsonl, .ndjson | a line: one JSON object; empty lines do not count |
| .parquet | a row |
| .txt | the whole file: one document |

A folder stands for all such files in it, at any depth, in the order of their names; files with
another ending and hidden ones are passed over.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reap_driver.calibration.source import DataSource
from reap_kernels.errors import DataError

_PARQUET_ROWS = 1024  # read at a time


@dataclass(frozen=True)
class Record:
    """One record and where it stands, as an error message names it."""

    place: str
    fields: dict[str, Any]


class BadRecords:
    """Records left out because something is wrong with them.

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
            self.first.append(str(error))


def read_records(source: DataSource, seed: int, bad: BadRecords | None = None) -> Iterator[Record]:
    """The records of a source, or the sample of them that its N asks for.

    Sampling counts the records first and then reads only the drawn ones, so memory holds one record
    (of Parquet: one batch of rows) at a time.

    Args:
        seed: equal seeds draw equal samples.

    Raises:
        DataError: no data, an ending nobody reads, or a malformed record, by file and line.
    """
    files = _files(source.location)
    chosen: set[int] | None = None
    if source.samples is not None:
        total = sum(_kind(file).count(file) for file in files)
        if source.samples < total:
            chosen = set(random.Random(seed).sample(range(total), source.samples))
    index, found = 0, False
    for file in files:
        for read in _kind(file).read(file):
            if chosen is None or index in chosen:
                found = True
                yield read()
            index += 1
    if not found:
        raise DataError(f"data {source.name} holds no records; give data with at least one")


_Deferred = Callable[[], Record]  # parses a record when called: those not drawn never are


@dataclass(frozen=True)
class _Kind:
    count: Callable[[Path], int]
    read: Callable[[Path], Iterable[_Deferred]]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        _kind(path)
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in _KINDS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise DataError(f"data {path}: no {', '.join(_KINDS)} file in this folder; add one")
    return files


def _kind(file: Path) -> _Kind:
    if file.suffix not in _KINDS:
        raise DataError(
            f"data {file}: ending {file.suffix!r} is not known; give one of {', '.join(_KINDS)}"
        )
    return _KINDS[file.suffix]


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of the lines that are not empty."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"data {file} cannot be read: {error.strerror or error}") from error


def _read_jsonl(file: Path) -> Iterator[_Deferred]:
    for number, line in _lines(file):
        yield partial(_parse_line, f"{file}:{number}", line)


def _parse_line(place: str, line: bytes) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise DataError(f"{place}: not valid JSON ({error}); correct the line") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: a JSON {type(value).__name__}; every line must be an object")
    return Record(place, value)


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    """The open file; whatever Arrow finds wrong with it becomes a DataError."""
    try:
        from pyarrow import parquet
        from pyarrow.lib import ArrowException
    except ImportError as error:
        raise DataError(
            f"data {file}: reading Parquet needs pyarrow, which is not installed; "
            "run `pip install reap-kernels[parquet]`"
        ) from error
    try:
        with parquet.ParquetFile(file) as opened:
            yield opened
    except (OSError, ArrowException) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"data {file} cannot be read as Parquet ({reason}); make or download it again"
        ) from error


def _count_parquet(file: Path) -> int:
    with _parquet(file) as opened:
        return int(opened.metadata.num_rows)


def _read_parquet(file: Path) -> Iterator[_Deferred]:
    number = 0
    with _parquet(file) as opened:
        for batch in opened.iter_batches(batch_size=_PARQUET_ROWS):
            for row in range(batch.num_rows):
                number += 1
                yield partial(_row, f"{file}, row {number}", batch, row)


def _row(place: str, batch: Any, row: int) -> Record:
    return Record(place, batch.slice(row, 1).to_pylist()[0])


def _read_text(file: Path) -> Iterator[_Deferred]:
    def read() -> Record:
        try:
            return Record(str(file), {"text": file.read_text(encoding="utf-8")})
        except OSError as error:
            raise DataError(f"data {file} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"data {file} is not UTF-8 text: {error}; convert it") from error

    yield read


_JSONL = _Kind(lambda file: sum(1 for _ in _lines(file)), _read_jsonl)
_KINDS = {
    ".jsonl": _JSONL,
    ".ndjson": _JSONL,
    ".parquet": _Kind(_count_parquet, _read_parquet),
    ".txt": _Kind(lambda _: 1, _read_text),
}
