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
        content = parse_json(read_bytes(path))
        check(content, kind)
    except Mismatch as error:
        raise unfit(path, what, f"{error}") from error
    except ValueError as error:
        raise unfit(path, what, f"it {error}") from error
    return content


def unfit(path: Path, what: str, why: str) -> PlanError:
    """The error about a file that is not what it is read as."""
    return PlanError(f"{path}: is no {what}: {why}; give another file, or its format by `from_`")


def write_json(path: Path, content: Any) -> None:
    """Writes a file, for people to read and compare, too."""
    path.write_text(json_in_lines(content), encoding="utf-8")
