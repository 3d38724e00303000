"""Fields of records that nothing is made of, and which of them a user should hear about."""

from collections.abc import Iterable
from typing import Any

# They say where a record is from or how it was counted, not what a model reads.
IRRELEVANT = frozenset(
    {"_id", "id", "idx", "index", "uid", "uuid", "instance_id", "__index_level_0__"}
    | {"dataset", "source", "path", "url", "date", "timestamp", "license", "licenses"}
    | {"lang", "language", "length", "num_tokens", "size", "meta", "metadata"}
    | {"tool_call_id", "tool_call_ids", "cache_control"}  # of messages
)


def unused(fields: dict[str, Any], used: Iterable[str], inside: str = "") -> set[str]:
    """The names of fields that say something and are not used.

    Args:
        fields: of a record, or of an object in it; those that are null or empty say nothing.
        used: names of those that are.
        inside: where in the record they are, such as `messages[].`; begins the names.

    Example:
        >>> unused({"text": "a", "id": 1, "summary": "b", "tools": []}, ["text"])
        {'summary'}
    """
    return {
        inside + name
        for name, value in fields.items()
        if name not in used and name not in IRRELEVANT and value not in (None, "", [], {})
    }
