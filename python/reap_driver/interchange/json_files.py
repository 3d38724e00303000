"""JSON files of other tools, read within limits and checked, and written a line per entry."""

from pathlib import Path
from typing import Any

from reap_driver.base.json_text import json_in_lines
from reap_kernels.documents import parse_json, read_bytes
from reap_kernels.errors import PlanError
from reap_kernels.schema import Kind, Mismatch, check


def read_json(path: Path, what: str, kind: Kind) -> Any:
    """The checked content of a file.

    Args:
        path: of it.
        what: it is, in words.
        kind: of its content.

    Raises:
        PlanError: it cannot be read, or its content is of another kind; names file and field.
    """
    try:
        content = read_bytes(path)
    except ValueError as error:
        raise unfit(path, what, f"it {error}") from error
    return checked(content, path, what, kind)


def checked(content: bytes, where: Path | str, what: str, kind: Kind) -> Any:
    """The checked content of a file's bytes.

    Args:
        content: JSON.
        where: the path of the file; or words for what is no file, such as "the body".
        what: it is, in words.
        kind: of its content.

    Raises:
        PlanError: see `read_json`.
    """
    try:
        found = parse_json(content)
        check(found, kind)
    except Mismatch as error:
        raise unfit(where, what, f"{error}") from error
    except ValueError as error:
        raise unfit(where, what, f"it {error}") from error
    return found


def unfit(where: Path | str, what: str, why: str) -> PlanError:
    """The error about a file, or what `where` calls it, that is not what it is read as."""
    file = isinstance(where, Path)
    remedy = "give another file, or its format by `from_`" if file else "send another"
    return PlanError(f"{where}: is no {what}: {why}; {remedy}")


def write_json(path: Path, content: Any) -> None:
    """Writes a file, for people to read and compare, too."""
    path.write_text(json_in_lines(content), encoding="utf-8")
