"""Types and ranges of the JSON values in our own file formats, and one check for all of them.

A format is described by nested kinds, such as

    Record({"layers": MapOf(Record({"kept": ListOf(Int())})), "ratio": Real(0, 1)})

and `check(value, kind)` finds the first value that does not fit, by the name of its field. Written
here rather than taken from a library, because `reap_kernels` needs nothing but torch and
safetensors, and because messages name the field as a user finds it in the file.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_INT = 2**63 - 1


class Mismatch(ValueError):
    """A value that does not fit; its text is `field 'a.b[3]' is VALUE; expected KIND`."""

    def __init__(self, at: str, found: str, expected: str) -> None:
        super().__init__(f"{_field(at)} {found}; expected {expected}")


class UnknownField(Mismatch):
    """A field that a record does not have: misspelled, or of a newer version."""


class Kind(Protocol):
    """What a value may be."""

    @abstractmethod
    def check(self, value: Any, at: str) -> None:
        """Raises Mismatch where `value`, found in the field `at`, is something else."""


def check(value: Any, kind: Kind, at: str = "") -> None:
    """Checks a parsed JSON value.

    Args:
        value: as `json.loads` made it.
        kind: what it must be.
        at: name of the field it was found in; empty for the whole file.

    Raises:
        Mismatch: the first value that does not fit, with its field.

    Example:
        >>> check({"ratio": 0.5}, Record({"ratio": Real(0, 1)}))
    """
    kind.check(value, at)


def short(value: Any, longest: int = 60) -> str:
    """A value as a message can show it: printable, in at most `longest` characters."""
    text = " ".join(repr(list(value) if isinstance(value, tuple) else value).split("\n"))
    return text if len(text) <= longest else text[: longest - 3] + "..."


@dataclass(frozen=True)
class Int:
    """A whole number, `low` to `high`; true and false are none."""

    low: int = 0
    high: int = MAX_INT

    def check(self, value: Any, at: str) -> None:
        if type(value) is not int or not self.low <= value <= self.high:
            limit = f"{self.low} or more" if self.high == MAX_INT else f"{self.low} to {self.high}"
            raise Mismatch(at, f"is {short(value)}", f"a whole number, {limit}")


@dataclass(frozen=True)
class Real:
    """A finite number within the limits that are given; `above` and `below` are outside."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def check(self, value: Any, at: str) -> None:
        if type(value) not in (int, float) or not math.isfinite(value) or not self._holds(value):
            words = {"above {}": self.above, "{} or more": self.low}
            words |= {"below {}": self.below, "{} or less": self.high}
            limits = [text.format(limit) for text, limit in words.items() if limit is not None]
            raise Mismatch(at, f"is {short(value)}", ", ".join(["a finite number", *limits]))

    def _holds(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


@dataclass(frozen=True)
class Text:
    """A text, at most `longest` characters; one of `choices` where there are any."""

    longest: int = 100_000
    choices: tuple[str, ...] = ()

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, str) or (self.choices and value not in self.choices):
            raise Mismatch(
                at,
                f"is {short(value)}",
                f"one of {', '.join(self.choices)}" if self.choices else "a text",
            )
        if len(value) > self.longest:
            raise Mismatch(at, f"has {len(value)} characters", f"at most {self.longest}")


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, bool):
            raise Mismatch(at, f"is {short(value)}", "true or false")


@dataclass(frozen=True)
class OrNull:
    """null, or what `kind` says."""

    kind: Kind

    def check(self, value: Any, at: str) -> None:
        if value is not None:
            self.kind.check(value, at)


@dataclass(frozen=True)
class Anything:
    """Any JSON value: what is recorded but never computed with."""

    def check(self, value: Any, at: str) -> None:
        """Fits always; the reader of the file has limited its depth, numbers and texts."""


@dataclass(frozen=True)
class ListOf:
    """A list of `shortest` to `longest` values of one kind."""

    kind: Kind
    shortest: int = 0
    longest: int = 10_000_000

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, list):
            raise Mismatch(at, f"is {short(value)}", "a list")
        if not self.shortest <= len(value) <= self.longest:
            raise Mismatch(at, f"has {len(value)} entries", f"{self.shortest} to {self.longest}")
        for number, item in enumerate(value):
            self.kind.check(item, f"{at}[{number}]")


@dataclass(frozen=True)
class MapOf:
    """An object whose values are all of one kind, under any names of at most `longest`
    characters.
    """

    kind: Kind
    shortest: int = 0
    longest: int = 500

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise Mismatch(at, f"is {short(value)}", "an object")
        if len(value) < self.shortest:
            raise Mismatch(at, f"has {len(value)} entries", f"at least {self.shortest}")
        for name, item in value.items():
            if len(name) > self.longest:
                found = f"has the name {short(name)} of {len(name)} characters"
                raise Mismatch(at, found, f"at most {self.longest}")
            self.kind.check(item, _under(at, name))


@dataclass(frozen=True)
class Record:
    """An object with these fields.

    Attributes:
        fields: that must be there.
        optional: that may be.
        open: whether other fields are let through; otherwise one is a mismatch, as most likely
            a name was misspelled.
    """

    fields: Mapping[str, Kind] = field(default_factory=dict)
    optional: Mapping[str, Kind] = field(default_factory=dict)
    open: bool = False

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise Mismatch(at, f"is {short(value)}", "an object")
        for name, kind in self.fields.items():
            if name not in value:
                raise Mismatch(_under(at, name), "is missing", "it to be there")
            kind.check(value[name], _under(at, name))
        for name, item in value.items():
            if name in self.optional:
                self.optional[name].check(item, _under(at, name))
            elif name not in self.fields and not self.open:
                known = ", ".join([*self.fields, *self.optional])
                raise UnknownField(_under(at, name), "is unknown", f"one of {known}")


def _under(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _field(at: str) -> str:
    return f"field {short(at, 200)}" if at else "the content"
