"""The file format of a comparison: `compare` prints it, `refit` leaves one, `report` reads it."""

import os
from dataclasses import dataclass
from typing import Any

from reap_kernels.documents import Format, parse_json, read_bytes
from reap_kernels.errors import DataError
from reap_kernels.schema import (
    Anything,
    Int,
    Kind,
    ListOf,
    MapOf,
    Mismatch,
    OrNull,
    Real,
    Record,
    Text,
)

RATES = ("orphan_rate", "stranded_rate", "retained_gate_share")


@dataclass(frozen=True)
class _Estimate:
    """A figure with its interval; null for an infinite figure and for an unknown interval."""

    value: Real

    def check(self, value: Any, at: str) -> None:
        numbers = OrNull(Real())
        Record({"value": OrNull(self.value), "low": numbers, "high": numbers}).check(value, at)
        low, high = value["low"], value["high"]
        if low is not None and high is not None and low > high:
            raise Mismatch(f"{at}.low", f"is {low}", f"{at}.high or less, which is {high}")


# Sums of probabilities and of their logarithms are rounded, so the bounds allow for that.
_POSITIVE, _SHARE = _Estimate(Real(low=0)), _Estimate(Real(low=-0.001, high=1.001))
_COLUMN = Record(
    {
        "predictions": Int(),
        "original_perplexity": _POSITIVE,
        "pruned_perplexity": _POSITIVE,
        "perplexity_ratio": _POSITIVE,
        "kl": _Estimate(Real(low=-0.001)),
        "acceptance": _SHARE,
        "same_top": _SHARE,
    },
    open=True,
)
_KNOWN: dict[str, Kind] = {
    "integrity": Record(optional=dict.fromkeys(RATES, Real(low=0, high=1.001)), open=True),
    "not_calibrated_on": ListOf(Text()),
}
_ONE: dict[str, Kind] = {
    "pruned": Text(),
    "confidence": Real(above=0, below=1),
    "overall": _COLUMN,
    "groups": MapOf(_COLUMN, shortest=1),
}
_REFIT = Record({"written": Text(choices=("refit", "cut")), "layers": MapOf(Anything())}, open=True)
_REMEDY = "give the output of `reap-kernels compare ... --json`"
FORMAT = Format(
    "reap-comparison",
    1,
    "comparison",
    {"original": Text(), **_ONE},
    DataError,
    _REMEDY,
    _KNOWN,
    open=True,
)
MANY = Format(
    "reap-comparisons",
    1,
    "comparison",
    {
        "original": Text(),
        "comparisons": ListOf(Record(_ONE, _KNOWN, open=True), shortest=1),
    },
    DataError,
    _REMEDY,
    {"refit": _REFIT},
    open=True,
)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A comparison of one pruned model, or of several (`MANY`).

    Raises:
        DataError: the file cannot be read or is neither; names the field.
    """
    try:
        content = parse_json(read_bytes(path))
    except ValueError as error:
        raise FORMAT.refusal(path, str(error)) from error
    several = isinstance(content, dict) and content.get("format") == MANY.name
    return (MANY if several else FORMAT).read(path)
