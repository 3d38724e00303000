"""How options are declared: one field holds an option's default, its help and its place.

The command line makes its flags from these fields, and a class's docstring lists them, so that
nothing about an option is written twice. Texts write options as Python does, in backquotes
(`seq_len`, `packing='none'`, `resume=True`); the command line shows those as its flags.

Nothing here imports torch, so that `--help` answers at once.
"""

import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any, TypeVar

from reap_driver.base.arguments import typed

_Options = TypeVar("_Options")


def refused(text: str) -> Exception:
    """An OptionError, imported where it is raised: with it comes torch, which `--help` must not."""
    from reap_driver.workflow.errors import OptionError

    return OptionError(text)


def option(
    default: Any = MISSING,
    *,
    help: str,  # what argparse calls it, too
    group: str = "",
    about: str = "",
    metavar: str | None = None,
    positional: bool = False,
    exclusive: str = "",
    needs: Mapping[str, tuple[Any, ...]] | None = None,
    recipe: bool = True,
) -> Any:
    """A field of a class of options.

    Args:
        default: where it is not given; without one it must be.
        help: what it does, in one sentence.
        group: title of the group of flags it stands in.
        about: what is said of the group as a whole, once.
        metavar: what stands for its value in the command line's help.
        positional: whether the command line takes it by place, without a flag.
        exclusive: options with the same word here exclude each other on the command line.
        needs: {name of another option: its values with which this one can be given; empty: any}.
        recipe: whether recipes may hold it, if those of its group can (`workflow.recipes`).
    """
    metadata = {
        "help": help,
        "group": group,
        "about": about,
        "metavar": metavar,
        "positional": positional,
        "exclusive": exclusive,
        "needs": needs or {},
        "recipe": recipe,
    }
    return dataclasses.field(default=default, metadata=metadata)


def options(cls: type[_Options]) -> type[_Options]:
    """Completes a dataclass of options: types are checked, its docstring lists its attributes."""
    cls.__init__.__qualname__ = cls.__name__  # as the message of a wrong type names it
    cls.__init__ = typed(cls.__init__)  # type: ignore[method-assign]
    lines = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        nested = nested_in(field)
        text = f"see `{nested.__name__}`." if nested else described(field)
        lines.append(textwrap.indent(textwrap.fill(f"{field.name}: {text}", 92), "    "))
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nAttributes:\n" + "\n".join(lines)
    return cls


def described(field: "dataclasses.Field[Any]") -> str:
    """An option in words: its help, choices and default."""
    text = str(field.metadata["help"])
    if field.default is True:  # the help is that of the flag that turns it off
        text = f"`{field.name}=False`: {text}"
    return f"{text}; default {field.default!r}." if shows_default(field) else f"{text}."


def shows_default(field: "dataclasses.Field[Any]") -> bool:
    """Whether a default is worth showing: it is a value, and the help does not state it."""
    empty = field.default in (MISSING, None, (), "") or isinstance(field.default, bool)
    return not empty and "(default" not in field.metadata["help"]


def nested_in(field: "dataclasses.Field[Any]") -> type | None:
    """The class of options that a field holds, if it does."""
    factory = field.default_factory
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def group_of(cls: type) -> Any:
    """A field that holds a class of options."""
    return dataclasses.field(default_factory=cls)


def every_field(cls: type) -> "Iterator[dataclasses.Field[Any]]":
    """The options of a class, those of the classes it holds in their place."""
    for field in dataclasses.fields(cls):
        nested = nested_in(field)
        if nested is None:
            yield field
        else:
            yield from every_field(nested)


def build(cls: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Options from a flat mapping of names to values; what is left out has its default.

    Args:
        cls: a class of options, which may hold others.
        given: {name: value}; a class that it holds may be given whole, by the field's name.

    Raises:
        OptionError: a name is unknown or missing, or values contradict each other.

    Example:
        >>> build(rd.DataOptions, {"data": ["code.jsonl"], "seq_len": 512}).seq_len
        512
    """
    left = dict(given)
    names = [field.name for field in every_field(cls)]
    groups = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = next((name for name in left if name not in (*names, *groups)), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown, names, 1)
        hint = f"; did you mean `{close[0]}`?" if close else f"; there are {', '.join(names)}"
        raise refused(f"{unknown} is no option of {cls.__name__}{hint}")
    return _build(cls, left)


def _build(cls: type[_Options], left: dict[str, Any]) -> _Options:
    """Takes what a class and those it holds can use out of `left`."""
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        nested = nested_in(field)
        # A class of options and one of its options may have the same name, such as `data`.
        if field.name in left and (nested is None or isinstance(left[field.name], nested)):
            values[field.name] = left.pop(field.name)
        elif nested is not None:
            values[field.name] = _build(nested, left)
        elif field.default is MISSING:
            raise refused(f"`{field.name}` is required: {field.metadata['help']}")
    return cls(**values)


def flat(given: Any) -> dict[str, Any]:
    """{name: value} of options, those of the classes they hold too."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        found |= flat(value) if nested_in(field) else {field.name: value}
    return found
