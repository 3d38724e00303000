"""Rows of Arrow tables as records: of Parquet files, and of data sets from the hub."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reap_driver.calibration.records import Record
from reap_driver.calibration.shapes import FIELDS
from reap_driver.calibration.unused import IRRELEVANT


def known_columns(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(those that records are made of, or all where there is none of them; others that might
    matter)."""
    known = [name for name in names if name in FIELDS] or list(names)
    return known, [name for name in names if name not in IRRELEVANT.union(known)]


def row_records(
    columns: Mapping[str, list[Any]], schema: Any, places: Sequence[str], others: Sequence[str]
) -> Iterator[Record]:
    """Rows as records that stand at `places`.

    Objects lose keys without a value: a column of objects has every key that any of them has.

    Args:
        columns: name to the values of the rows.
        schema: Arrow's, of a table with these columns.
        places: one a row.
        others: columns that are not read, and are not used then.
    """
    import pyarrow

    cleaned = [
        [_without_nulls(value) for value in values]
        if _holds_objects(pyarrow, schema.field(name).type)
        else values
        for name, values in columns.items()
    ]
    for place, *values in zip(places, *cleaned, strict=True):
        yield Record(place, dict(zip(columns, values, strict=True)), set(others))


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
