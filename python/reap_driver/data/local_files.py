"""Reads records from local files.

| suffix | a record is |
|---|---|
| .jsonl, .ndjson | a line with a JSON object; empty lines are skipped |
| .json | the same, or an element of an array |
| .parquet | a row |
| .csv, .tsv | a row; the first names the fields |
| .txt | the whole file, as one document |

All but Parquet may be compressed, with a second suffix .gz, .bz2, .xz or .zst. A folder stands for
all such files in it, at any depth, in the order of their names; hidden files, files with other
suffixes, and those that describe a data set (`_ABOUT`) are skipped. A record may have at most
`compressed_files.LARGEST` bytes.
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
from reap_driver.data.csv_rows import DELIMITERS, count_rows, read_rows
from reap_driver.data.json_array import elements, first_character
from reap_driver.data.records import BadRecords, Chosen, Numbered, Record, guard, picked
from reap_kernels.documents import parse_json
from reap_kernels.errors import DataError
from reap_kernels.files import is_file

_PARQUET_ROWS = 1024  # rows read at a time
# Files beside those of a data set that hold no records.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


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

    def pick(self, chosen: Sequence[int], bad: BadRecords | None) -> Numbered:
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
    read: Callable[[Path, Chosen, BadRecords | None], Numbered]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        _kind(path)
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if _known(file)
        and file.name not in _ABOUT
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
        endings = f"{', '.join(_KINDS)}, all but Parquet also with {', '.join(COMPRESSIONS)}"
        raise DataError(f"data {file}: ending {file.suffix!r} is not known; give one of {endings}")
    return _KINDS[inner_suffix(file)]


def _count_lines(file: Path) -> int:
    return sum(1 for _ in lines(file))


def _read_lines(file: Path, chosen: Chosen, bad: BadRecords | None) -> Numbered:
    def parse(_: int, part: tuple[int, bytes | None]) -> Record:
        place, line = part
        return _parse(f"{file}:{place}", line, file.parent, "line")

    return picked(lines(file), parse, chosen, bad)


def _count_json(file: Path) -> int:
    return sum(1 for _ in elements(file)) if _is_array(file) else _count_lines(file)


def _read_json(file: Path, chosen: Chosen, bad: BadRecords | None) -> Numbered:
    if not _is_array(file):
        return _read_lines(file, chosen, bad)

    def parse(number: int, text: str) -> Record:
        return _parse(f"{file}, record {number + 1}", text, file.parent, "element")

    return picked(elements(file), parse, chosen, bad)


def _is_array(file: Path) -> bool:
    """Whether a .json file holds an array; else it holds JSON lines.

    Raises:
        DataError: it holds neither.
    """
    if first_character(file) == "[":
        return True
    first = next((line for _, line in lines(file)), b"{}")
    try:
        parse_json(first or b"", plain=False)
    except ValueError as error:
        raise DataError(
            f"data {file}: holds neither JSON lines nor an array of objects (its first line "
            f"{error}); if it is one object with a list of records, give that list as the file, "
            "for example with `jq .NAME`"
        ) from error
    return False


def _parse(place: str, text: str | bytes | None, folder: Path, what: str) -> Record:
    if text is None:
        raise DataError(f"{place}: is larger than {LARGEST} bytes; divide the record")
    try:
        value = parse_json(text, plain=False)
    except ValueError as error:
        raise DataError(f"{place}: {error}; correct the {what}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: a JSON {type(value).__name__}; every {what} must be an object")
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


def _read_parquet(file: Path, chosen: Chosen, bad: BadRecords | None) -> Numbered:
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


def _read_text(file: Path, chosen: Chosen, bad: BadRecords | None) -> Numbered:
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
    ".json": _Kind(_count_json, _read_json),
    ".parquet": _Kind(_count_parquet, _read_parquet),
    **dict.fromkeys(DELIMITERS, _Kind(count_rows, read_rows)),
    ".txt": _Kind(lambda _: 1, _read_text),
}
