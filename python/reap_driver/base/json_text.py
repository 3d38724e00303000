"""JSON for people to read and compare: one line per field, and per entry of a field."""

from typing import Any

from reap_kernels.documents import to_json


def json_in_lines(value: Any) -> str:
    """A JSON object as text, with deeper levels on one line each, and a final line break.

    Example:
        >>> print(json_in_lines({"ratio": 0.5, "layers": {"a": [1, 2], "b": [0]}}), end="")
        {
          "ratio": 0.5,
          "layers": {
            "a": [1, 2],
            "b": [0]
          }
        }
    """
    return _in_lines(value, 0) + "\n"


def _in_lines(value: Any, depth: int) -> str:
    if depth == 2 or not value or not isinstance(value, dict | list):
        return to_json(value)
    indent = "  " * depth
    entries = (
        [f"{to_json(key)}: {_in_lines(item, depth + 1)}" for key, item in value.items()]
        if isinstance(value, dict)
        else [_in_lines(item, depth + 1) for item in value]
    )
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + ",".join(f"\n{indent}  {entry}" for entry in entries) + f"\n{indent}{closing}"
