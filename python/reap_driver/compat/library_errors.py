"""Turns whatever a library raises on untrusted input into one error that names the input.

transformers builds objects from a checkpoint's JSON files (config.json, generation_config.json, a
tokenizer's files). Their values reach code that does not check them and so raises any exception of
Python: TypeError, KeyError, ZeroDivisionError, AssertionError, RuntimeError, ImportError. None of
these names the file and no list of them is complete, so all are caught here, and only here.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reap_kernels.errors import CheckpointError, ReapError
from reap_kernels.schema import short

# Fields whose default would give another model, or that do not affect building.
_NOT_TRIED = frozenset(
    {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map"}
)


@contextlib.contextmanager
def wrap_errors(
    what: str,
    remedy: str,
    *,
    error: type[ReapError] = CheckpointError,
    culprit: Callable[[Exception], str | None] | None = None,
) -> Iterator[None]:
    """Inside, every exception of a library becomes one error that names the input.

    Errors of this project (ReapError) pass through, and so does a lack of memory, which the input
    need not have caused.

    Args:
        what: the input and what failed, such as "model/config.json: no model can be built".
        remedy: what the user can do, a clause without full stop.
        error: the class to raise.
        culprit: given the exception, returns the field that caused it, or None.

    Raises:
        ReapError: of the class `error`.

    Example:
        >>> with wrap_errors("tokenizer of m cannot be loaded", "add tokenizer.json"):
        ...     {}["added_tokens"]
        Traceback (most recent call last):
        reap_kernels.errors.CheckpointError: tokenizer of m cannot be loaded (KeyError: ...
    """
    try:
        yield
    except (ReapError, MemoryError):
        raise
    except BaseException as raised:  # of any class, see above
        if not is_fault(raised):
            raise
        if "DefaultCPUAllocator" in str(raised) or type(raised).__name__ == "OutOfMemoryError":
            raise
        field = culprit(raised) if culprit and isinstance(raised, Exception) else None
        blamed = "" if field is None else f"; it can be without field {field}"
        raise error(f"{what} ({described(raised)}){blamed}; {remedy}") from raised


def is_fault(error: BaseException) -> bool:
    """Whether an exception reports a failure. Panics of Rust libraries do, though they are not an
    Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def place_in_library(error: BaseException) -> str | None:
    """Module and line of transformers, or of a checkpoint's own code, that raised an error; None if
    the error was raised elsewhere.

    Example:
        >>> place_in_library(ValueError("raised here"))
    """
    place = None
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        package = module.partition(".")[0]
        if package in ("reap_driver", "reap_kernels"):
            place = None
        elif package in ("transformers", "transformers_modules"):
            place = f"{module}, line {trace.tb_lineno},"
        trace = trace.tb_next
    return place


def described(error: BaseException) -> str:
    """An exception's text in one line, after its class if the text alone is not informative."""
    text = one_line(error)
    kind = type(error).__name__
    plain = isinstance(error, ValueError | OSError | ImportError) or kind.startswith("Strict")
    return text if (plain and " " in text) or text == kind else f"{kind}: {text}"


def one_line(error: object, longest: int = 300) -> str:
    """A text, such as that of an error, in one line of at most `longest` characters, without a
    final full stop.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()
    return (text if len(text) <= longest else text[: longest - 3] + "...").rstrip(". ")


def offending_field(
    fields: Mapping[str, Any],
    raised: Exception,
    build: Callable[[dict[str, Any]], object],
    seconds: float = 3.0,
) -> str | None:
    """The field that makes a configuration unusable, with its value, for an error message.

    Removes one field at a time, so that it gets its class's default, and tries again: first the
    fields whose value the error shows, then the others in order, nested fields first.

    Args:
        fields: the configuration.
        raised: the exception that using it raised.
        build: uses a configuration; raises if that fails.
        seconds: stop searching after this time.

    Returns:
        For example "'text_config.hidden_act' (here 'x')"; None if no single field was found.
    """
    end = time.monotonic() + seconds
    text = str(raised)
    paths = sorted(_paths(fields), key=lambda found: repr(found[1]) not in text)
    for path, value in paths:
        if time.monotonic() > end:
            break
        edited = copy.deepcopy(dict(fields))
        part: Any = edited
        for name in path[:-1]:
            part = part[name]
        del part[path[-1]]
        with contextlib.suppress(Exception):
            build(edited)
            return f"{short('.'.join(path))} (here {short(value)})"
    return None


def _paths(fields: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every field, the fields of a nested object before the object itself."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from (((name, *path), inner) for path, inner in _paths(value))
        if name not in _NOT_TRIED:
            yield (name,), value
