"""Converts rows of Arrow tables, from Parquet files or hub data sets, to records."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from reap_driver.compat.library_errors import wrap_errors
from reap_driver.data.compressed_files import LARGEST
from reap_driver.data.record_formats import FIELDS
from reap_driver.data.records import IRRELEVANT, BadRecords, Record, guard
from reap_kernels.errors import DataError


def known_columns(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divides column names: (known fields of records, or all columns if there are none of these;
    other columns that may hold content).
    """
    known = [name for name in names if name in FIELDS] or list(names)
    return known, [name for name in names if name not in IRRELEVANT.union(known)]


def row_records(
    rows: Any, places: Mapping[int, str], others: Sequence[str], bad: BadRecords | None
) -> Iterator[tuple[int, Record]]:
    """(number, record) of each row.

    Keys whose value is null are removed from objects: in a column of objects, every object has all
    keys that any of them has.

    Args:
        rows: an Arrow batch or table, or a `datasets.Dataset`.
        places: number of each row -> its place, for error messages.
        others: columns that are not read; they are recorded as unused.
        bad: collects the errors of bad rows, which are skipped; if None, errors are raised.
    """
    numbers = list(places)
    columns = None
    with suppress(DataError), wrap_errors("rows", "see below", error=DataError):
        if _expanded(rows) <= LARGEST:
            columns = _columns(rows, 0, len(numbers))
    if columns is None:
        yield from _one_by_one(rows, places, others, bad)
        return
    for number, *values in zip(numbers, *columns.values(), strict=True):
        fields = dict(zip(columns, values, strict=True))
        yield number, Record(places[number], fields, set(others))


def _one_by_one(
    rows: Any, places: Mapping[int, str], others: Sequence[str], bad: BadRecords | None
) -> Iterator[tuple[int, Record]]:
    left_out = guard(bad)
    for at, (number, place) in enumerate(places.items()):
        fields = None
        with left_out, wrap_errors(f"{place}: cannot be read", "correct it", error=DataError):
            if _expanded(rows, at) > LARGEST:
                raise DataError(f"{place}: is larger than {LARGEST} bytes; divide the record")
            fields = {name: value for name, [value] in _columns(rows, at, 1).items()}
        if fields is not None:
            yield number, Record(place, fields, set(others))


def text_leaves(schema: Any) -> list[str]:
    """Paths of the columns of a Parquet file that hold text, nested ones included.

    They are read dictionary-encoded, as they are stored. Otherwise a text that is stored once and
    referenced by a thousand rows would take a thousand times its size in memory.
    """
    leaves = [schema.column(number) for number in range(len(schema))]
    return [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]


def _expanded(rows: Any, at: int | None = None) -> int:
    """Bytes that rows, or one of them, take without dictionary encoding; 0 for a
    `datasets.Dataset`, whose texts are not dictionary-encoded.
    """
    if hasattr(rows, "features"):
        return 0
    part = rows if at is None else rows.slice(at, 1)
    return sum(_bytes_of(column) for column in part.columns)


def _bytes_of(array: Any) -> int:
    import pyarrow
    from pyarrow import compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary).cast(pyarrow.int64())
        return compute.sum(lengths.take(array.indices)).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(_bytes_of(field) for field in array.flatten())
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _bytes_of(array.flatten())
    return int(array.nbytes)


def _columns(rows: Any, start: int, count: int) -> dict[str, list[Any]]:
    """Column name -> values of `count` rows from `start`."""
    import pyarrow

    if hasattr(rows, "features"):
        columns, schema = rows[start : start + count], rows.features.arrow_schema
    else:
        columns, schema = rows.slice(start, count).to_pydict(), rows.schema
    return {
        name: [_without_nulls(value) for value in values]
        if _holds_objects(pyarrow, schema.field(name).type)
        else values
        for name, values in columns.items()
    }


def _holds_objects(pyarrow: Any, kind: Any) -> bool:
    """Whether values of an Arrow type are objects, or lists of objects."""
    if pyarrow.types.is_struct(kind):
        return True
    nested = (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    )
    return nested and _holds_objects(pyarrow, kind.value_type)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
