"""Flags made from classes of options, and options made from what was given by flags.

A field's default and help are the flag's; what text means a value is said here, by name.
"""

import argparse
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, TypeVar

from reap_driver.workflow.console import flags
from reap_driver.workflow.fields import every_field, refused, shows_default
from reap_driver.workflow.single_options import REPLACED

_Options = TypeVar("_Options")


def add(parser: argparse.ArgumentParser, *classes: type, without: tuple[type, ...] = ()) -> None:
    """Adds a flag for every option of these classes, in their order; the first of a name counts.

    Args:
        parser: receives them.
        classes: of options.
        without: classes that these hold, whose options get no flags.
    """
    groups: dict[str, Any] = {}
    exclusive: dict[str, Any] = {}
    seen = {field.name for cls in without for field in every_field(cls)}
    for cls in classes:
        for field in every_field(cls):
            if field.name in seen:
                continue
            seen.add(field.name)
            meta = field.metadata
            place: Any = parser
            if meta["group"]:
                if meta["group"] not in groups:
                    about = flags(meta["about"]) or None
                    groups[meta["group"]] = parser.add_argument_group(meta["group"], about)
                place = groups[meta["group"]]
            if meta["exclusive"]:
                key = meta["exclusive"]
                if key not in exclusive:
                    exclusive[key] = place.add_mutually_exclusive_group()
                place = exclusive[key]
            _add(place, field)


def read(cls: type[_Options], args: argparse.Namespace) -> _Options:
    """The options of a class, from the flags that were given.

    Raises:
        OptionError: they contradict each other.
    """
    from reap_driver.workflow.recipes import build  # with it comes torch

    names = [field.name for field in every_field(cls)]
    return build(cls, {name: getattr(args, name) for name in names if hasattr(args, name)})


def require(args: argparse.Namespace, *names: str) -> None:
    """Raises OptionError where flags that a command needs were not given."""
    missing = [f"--{name.replace('_', '-')}" for name in names if not hasattr(args, name)]
    if missing:
        raise refused(f"the following arguments are required: {', '.join(missing)}")


def _add(place: Any, field: "Field[Any]") -> None:
    """Adds one flag."""
    meta = field.metadata
    text = flags(meta["help"]).replace("%", "%%")
    shown: dict[str, Any] = {"metavar": meta["metavar"]} if meta["metavar"] else {}
    if meta["positional"]:
        optional = {} if field.default is MISSING else {"nargs": "?"}
        optional |= {"nargs": "+"} if field.name in _SEVERAL and Any in _types(field) else {}
        place.add_argument(field.name, help=text, **shown, **optional)
        return
    flag = f"--{field.name.rstrip('_').replace('_', '-')}"
    # What is not given stays away, so that the default is the field's alone.
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
    if field.default is None and bool in _types(field):  # on, off, or neither
        place.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **common)
    elif field.default is False and (words := _words(field)):  # off, on, or on in some way
        how: dict[str, Any] = {"nargs": "?", "const": True, "metavar": "|".join(words)}
        place.add_argument(flag, type=_word(flag, words), help=text, **how, **common)
    elif field.default is False:
        place.add_argument(flag, action="store_true", help=text, **common)
    elif field.default is True:
        place.add_argument(
            flag.replace("--", "--no-", 1), action="store_false", help=text, **common
        )
    else:
        if words := _words(field):
            shown["choices"] = words
        if field.default is MISSING:
            common["required"] = True
        if field.name in _REPEATED:
            common["action"] = "append"
        if field.name in _VALUES:
            common["type"] = _VALUES[field.name]
        text += f" (default: {field.default})" if shows_default(field) else ""
        place.add_argument(flag, help=text, **common, **shown)


def _types(field: "Field[Any]") -> tuple[Any, ...]:
    """The types that a field's value can have."""
    union = typing.get_origin(field.type) in (typing.Union, types.UnionType)
    return typing.get_args(field.type) if union else (field.type,)


def _words(field: "Field[Any]") -> tuple[str, ...]:
    """The words that a field's value can be, where they are known."""
    literals = (one for one in _types(field) if typing.get_origin(one) is typing.Literal)
    return next(map(typing.get_args, literals), ())


def _word(flag: str, words: Sequence[str]) -> Callable[[str], str]:
    """Reads what may follow a flag that stands alone, too; what follows may be meant otherwise."""

    def read(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {' or '.join(words)}; put {flag} alone behind the other arguments"
            )
        return text

    return read


def add_output(parser: argparse.ArgumentParser, default: object = False) -> None:
    """--json and --quiet, of every command; SUPPRESS as the default where they may stand before."""
    group = parser.add_argument_group("output")
    for names, text in (
        (("--json",), "print one JSON object on stdout (errors too)"),
        (("-q", "--quiet"), "print no progress, notes or results"),
    ):
        group.add_argument(*names, action="store_true", default=default, help=text)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """--overwrite, where the output is no option of a job."""
    parser.add_argument("--overwrite", action="store_true", help=REPLACED)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not re.fullmatch(r"\d+", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def share(text: str) -> float:
    """A number; the options say which are shares that they take."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write 50% as 0.5") from error


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, such as 0.001") from error


def batch_size(text: str) -> int | None:
    """A whole number above 0, or `auto`: None."""
    if text == "auto":
        return None
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from error


def weights(text: str) -> dict[str, float]:
    """GROUP=NUMBER, separated by commas."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise argparse.ArgumentTypeError(f"{part!r} is not GROUP=NUMBER, such as code=0.7")
    return found


def words(text: str) -> tuple[str, ...]:
    """Names, separated by commas."""
    return tuple(name for name in text.split(",") if name)


_SEVERAL = ("pruned",)
_REPEATED = ("data", "recipe", "protect", "hold_out_group", "validate")
# What text means the value of an option; of others it is the text.
_VALUES: dict[str, Callable[[str], Any]] = {
    "batch_size": batch_size,
    "bits": number,
    "context": positive,
    "draws": positive,
    "elites": positive,
    "ep": positive,
    "evaluations": positive,
    "folds": positive,
    "generations": positive,
    "journal_every": positive,
    "keep": positive,
    "layer_ratios": Path,
    "limit": positive,
    "max_len": positive,
    "population": positive,
    "ratio": share,
    "ridge": number,
    "seed": int,
    "seq_len": positive,
    "sequences": positive,
    "skip_first": positive,
    "skip_last": positive,
    "steps": positive,
    "tasks": words,
    "tp": positive,
    "validation": share,
    "weights": weights,
    "width_multiple": positive,
}
