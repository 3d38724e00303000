"""Rows of Arrow tables as records: of Parquet files, and of data sets from the hub."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reap_driver.calibration.records import BadRecords, Record, guard
from reap_driver.calibration.shapes import FIELDS
from reap_driver.calibration.unused import IRRELEVANT
from reap_driver.compat.foreign import foreign
from reap_kernels.errors import DataError


def known_columns(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(those that records are made of, or all where there is none of them; others that might
    matter)."""
    known = [name for name in names if name in FIELDS] or list(names)
    return known, [name for name in names if name not in IRRELEVANT.union(known)]


def row_records(
    rows: Any, places: Mapping[int, str], others: Sequence[str], bad: BadRecords | None
) -> Iterator[tuple[int, Record]]:
    """(number, record) of rows.

    Objects lose keys without a value: a column of objects has every key that any of them has.

    Args:
        rows: Arrow's batch or table, or a `datasets.Dataset`.
        places: for each row its number, and where it stands.
        others: columns that are not read, and are not used then.
        bad: takes rows whose values Python does not have; None raises that.
    """
    numbers = list(places)
    try:
        columns = _columns(rows, 0, len(numbers))
    except Exception:  # noqa: BLE001  of a date out of range, say, or bytes that are no text
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
        with left_out, foreign(f"{place}: cannot be read", "correct it", error=DataError):
            fields = {name: value for name, [value] in _columns(rows, at, 1).items()}
        if fields is not None:
            yield number, Record(place, fields, set(others))


def _columns(rows: Any, start: int, count: int) -> dict[str, list[Any]]:
    """Name to values of some rows."""
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
    """Whether values of the type are objects, or lists of them."""
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
