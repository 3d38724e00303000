"""Reads records from local files.

| suffix | a record is |
|---|---|
| .jsonl, .ndjson | a line with a JSON object; empty lines are skipped |
| .parquet | a row |
| .txt | the whole file, as one document |

JSON lines and text may be compressed, with a second suffix .gz, .bz2, .xz or .zst. A folder stands
for all such files in it, at any depth, in the order of their names; hidden files and files with
other suffixes are skipped. A record may have at most `compressed_files.LARGEST` bytes.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from reap_driver.compat.library_errors import one_line, wrap_errors
from reap_driver.data.arrow import known_columns, row_records, text_leaves
from reap_driver.data.compressed_files import COMPRESSIONS, LARGEST, inner_suffix, lines, opened
from reap_driver.data.records import BadRecords, Record, guard
from reap_kernels.documents import parse_json
from reap_kernels.errors import DataError
from reap_kernels.files import is_file

_PARQUET_ROWS = 1024  # rows read at a time
_Chosen = frozenset[int] | None  # numbers of records in a file, from 0; None for all
_Numbered = Iterator[tuple[int, Record]]


class Files:
    """The records of a file, or of all files in a folder.

    Args:
        path: path of the file or folder.

    Raises:
        DataError: the suffix is not known, or the folder has no file with a known one.
    """

    def __init__(self, path: Path) -> None:
        self._files = _files(path)

    @cached_property
    def _counts(self) -> list[int]:
        return [_kind(file).count(file) for file in self._files]

    def count(self) -> int:
        """Number of records. Lines are counted without being parsed."""
        return sum(self._counts)

    def read(self, bad: BadRecords | None) -> Iterator[Record]:
        """All records, in order.

        Args:
            bad: collects the errors of bad records, which are skipped; if None, errors are raised.

        Raises:
            DataError: a file cannot be read, or a record is malformed; names file and line.
        """
        for file in self._files:
            for _, record in _kind(file).read(file, None, bad):
                yield record

    def pick(self, chosen: Sequence[int], bad: BadRecords | None) -> _Numbered:
        """(number, record) of the chosen records, in order. No other record is parsed.

        Args:
            chosen: numbers of records, ascending, counted from 0.
            bad: see `read`.

        Raises:
            DataError: see `read`.
        """
        start = 0
        for file, count in zip(self._files, self._counts, strict=True):
            first, last = bisect_left(chosen, start), bisect_left(chosen, start + count)
            if first < last:
                here = frozenset(number - start for number in chosen[first:last])
                for number, record in _kind(file).read(file, here, bad):
                    yield start + number, record
            start += count


@dataclass(frozen=True)
class _Kind:
    count: Callable[[Path], int]
    read: Callable[[Path, _Chosen, BadRecords | None], _Numbered]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        _kind(path)
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if _known(file)
        and is_file(file)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise DataError(f"data {path}: no {', '.join(_KINDS)} file in this folder; add one")
    return files


def _known(file: Path) -> bool:
    kind = inner_suffix(file)
    return kind in _KINDS and (kind != ".parquet" or file.suffix == kind)


def _kind(file: Path) -> _Kind:
    if not _known(file):
        endings = f"{', '.join(_KINDS)}, the text ones also with {', '.join(COMPRESSIONS)}"
        raise DataError(f"data {file}: ending {file.suffix!r} is not known; give one of {endings}")
    return _KINDS[inner_suffix(file)]


def _count_lines(file: Path) -> int:
    return sum(1 for _ in lines(file))


def _read_lines(file: Path, chosen: _Chosen, bad: BadRecords | None) -> _Numbered:
    left_out = guard(bad)
    for number, (place, line) in enumerate(lines(file)):
        if chosen is None or number in chosen:
            record = None
            with left_out:
                record = _parse_line(f"{file}:{place}", line, file.parent)
            if record is not None:
                yield number, record


def _parse_line(place: str, line: bytes | None, folder: Path) -> Record:
    if line is None:
        raise DataError(f"{place}: is larger than {LARGEST} bytes; divide the record")
    try:
        value = parse_json(line, plain=False)
    except ValueError as error:
        raise DataError(f"{place}: {error}; correct the line") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: a JSON {type(value).__name__}; every line must be an object")
    return Record(place, value, folder=folder)


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    """Opens a Parquet file; errors of Arrow become a DataError."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"data {file}: reading Parquet needs pyarrow, which is not installed; "
            "run `pip install reap-kernels[data]`"
        ) from error
    fails = f"data {file} cannot be read as Parquet"
    with wrap_errors(fails, "make or download it again", error=DataError):
        with parquet.ParquetFile(file) as plain:
            leaves = text_leaves(plain.schema)
        with parquet.ParquetFile(file, read_dictionary=leaves) as source:
            yield source


def _count_parquet(file: Path) -> int:
    with _parquet(file) as source:
        return int(source.metadata.num_rows)


def _read_parquet(file: Path, chosen: _Chosen, bad: BadRecords | None) -> _Numbered:
    start = 0
    with _parquet(file) as source:
        columns, others = known_columns(source.schema_arrow.names)
        for batch in source.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            rows = range(start, start + batch.num_rows)
            wanted = [row for row in rows if chosen is None or row in chosen]
            if wanted:
                part = batch if chosen is None else batch.take([row - start for row in wanted])
                places = {row: f"{file}, row {row + 1}" for row in wanted}
                for number, record in row_records(part, places, others, bad):
                    yield number, replace(record, folder=file.parent)
            start += batch.num_rows


def _read_text(file: Path, chosen: _Chosen, bad: BadRecords | None) -> _Numbered:
    text = None
    with guard(bad), opened(file) as stream:
        content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise DataError(
                f"data {file}: is larger than {LARGEST} bytes, which are one document; divide it, "
                "or give JSON lines"
            )
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"data {file} is not UTF-8 text ({one_line(error)}); convert it"
            ) from error
    if text is not None:
        yield 0, Record(str(file), {"text": text})


_LINES = _Kind(_count_lines, _read_lines)
_KINDS = {
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".parquet": _Kind(_count_parquet, _read_parquet),
    ".txt": _Kind(lambda _: 1, _read_text),
}
