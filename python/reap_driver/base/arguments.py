"""Checks the types of the arguments of public functions against their annotations, at each call.

A path where a model belongs, or one batch where a list of batches does, ends in one error that
names the argument. Containers are checked one level deep; the functions check the values.
Importing this module does not import torch.
"""

# Written by hand because typeguard 4.6 and beartype 0.23 accept other values: both take True for an
# int and a text for a Sequence[str], and refuse NumPy numbers and arrays; beartype checks one
# random item of a list. Changing that means overriding their checkers for the whole process, in as
# many lines, and they take 0.4 s to import.

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")


def typed(function: Callable[_Given, _Returned]) -> Callable[_Given, _Returned]:
    """Decorator: raises UsageError when an argument does not have its annotation's type.

    Example:
        >>> @typed
        ... def half(ratio: float) -> float:
        ...     return ratio / 2
        >>> half("0.5")
        Traceback (most recent call last):
        reap_kernels.errors.UsageError: half: ratio is '0.5', a str; expected float
    """
    signature = inspect.signature(function)
    name = function.__qualname__

    @functools.cache
    def hints() -> dict[str, Any]:
        return typing.get_type_hints(function, localns=_TypesOnly())

    @functools.wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
        from reap_kernels.errors import UsageError

        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"{name}: {error}; see help({name})") from None
        for argument, value in bound.arguments.items():
            hint = hints().get(argument, Any)
            if not _fits(value, hint):
                raise UsageError(f"{name}: {argument} {_unlike(value, hint)}")
        return function(*args, **kwargs)

    return call


def mistake(cls: type, name: str, value: Any) -> str:
    """What is wrong with a value of a dataclass's field by its type; empty if nothing is.

    Example:
        >>> mistake(rd.DataOptions, "seq_len", "long")
        "seq_len is 'long', a str; expected int or None"
    """
    hint = typing.get_type_hints(cls, localns=_TypesOnly())[name]
    return "" if _fits(value, hint) else f"{name} {_unlike(value, hint)}"


def _unlike(value: Any, hint: Any) -> str:
    """Says that a value has not the type that is expected."""
    from reap_kernels.schema import short

    kind = type(value).__name__
    found = kind if "\n" in repr(value) else f"{short(value)}, a {kind}"
    return f"is {found}; expected {_words(hint)}"


class _TypesOnly(dict[str, Any]):
    """Resolves names that modules import under `TYPE_CHECKING` only."""

    def __missing__(self, name: str) -> Any:
        if name == "Tensor":
            import torch

            return torch.Tensor
        import reap_kernels

        if name in reap_kernels.__all__:
            return getattr(reap_kernels, name)
        raise KeyError(name)


def _fits(value: Any, hint: Any, depth: int = 1) -> bool:
    """Whether a value has a type; its entries are checked too where `depth` is above 0."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one, depth) for one in args)
    if origin is Literal:
        return isinstance(value, str | int) and value in args
    if origin is not None:
        return _fits_container(value, origin, args, depth)
    if hint in (Any, None, types.NoneType):
        return hint is Any or value is None
    return _is_a(value, hint)


def _fits_container(value: Any, origin: Any, args: tuple[Any, ...], depth: int) -> bool:
    """Whether a value has a generic type: a mapping, a callable, an iterable or a sequence."""
    if issubclass(origin, Mapping):
        entries = zip(value, value.values(), strict=True) if isinstance(value, Mapping) else ()
        return isinstance(value, Mapping) and (
            depth == 0
            or all(_fits(k, args[0], 0) and _fits(v, args[1], depth - 1) for k, v in entries)
        )
    if not issubclass(origin, typing.Iterable):
        return isinstance(value, origin)
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        return False
    if not issubclass(origin, Collection):  # checking the items of an iterator would consume it
        return True
    return hasattr(value, "__len__") and (
        depth == 0 or all(_fits(item, args[0], depth - 1) for item in value)
    )


def _is_a(value: Any, kind: type) -> bool:
    """Whether a value is an instance of a class. NumPy numbers are numbers, booleans are not."""
    if kind in (int, float):
        if isinstance(value, bool):
            return False
        try:
            float(value) if kind is float else operator.index(value)
        except (TypeError, ValueError):
            return False
        return not isinstance(value, str | bytes)
    if kind.__name__ == "PreTrainedModel":  # or a wrapper of one, see `unwrap_model`
        import torch

        return isinstance(value, torch.nn.Module)
    if getattr(kind, "_is_protocol", False):
        return True
    return isinstance(value, kind)


def _words(hint: Any) -> str:
    """A type as an error message names it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(one) for one in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if hint is types.NoneType:
        return "None"
    if origin is None or not args or origin.__name__ == "Callable":
        return str(getattr(origin or hint, "__name__", hint))
    return f"{origin.__name__} of {' to '.join(_words(one) for one in args)}"
