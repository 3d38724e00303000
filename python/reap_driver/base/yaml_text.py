"""Parses YAML from untrusted files into JSON values, within the limits set for JSON.

Recipes, files of ratios and the front matter of a README need no other types. Anchors and aliases
are refused because a short text can expand to an unbounded value with them; so are duplicate names
and whatever `reap_kernels.documents` refuses in JSON. Dates stay text.
"""

from typing import Any

import yaml  # type: ignore[import-untyped]

from reap_kernels.documents import check_values, utf8
from reap_kernels.schema import short

MAX_BYTES = 1_000_000


class _Refused(ValueError):
    """YAML that says more than JSON can."""


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases, and without types that JSON does not have."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise _Refused(
                f"has the anchor or alias {short(event.anchor)} in line "
                f"{event.start_mark.line + 1}, which is not read: write the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name, (key, _) in zip(names, node.value, strict=True):
            if type(name) not in (str, int):
                raise _Refused(
                    f"has the name {short(name)} in line {key.start_mark.line + 1}; names are texts"
                )
        if len({str(name) for name in names}) != len(names):
            twice = next(name for name in names if [str(n) for n in names].count(str(name)) > 1)
            raise _Refused(
                f"has the name {short(str(twice))} twice in the object that begins in line "
                f"{node.start_mark.line + 1}"
            )
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return {str(name): value for name, value in found.items()}

    def construct_yaml_int(self, node: Any) -> int:
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > 64:  # Python refuses to print a number with too many digits
            raise _Refused(f"holds the number {short(node.value)}, which 64 bits do not hold")
        return value


_JSON_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in _JSON_TYPES]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: made
    for tag, made in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _JSON_TYPES
} | {"tag:yaml.org,2002:int": _Loader.construct_yaml_int}


def _reason(error: yaml.YAMLError) -> str:
    """What is wrong, and where, without the excerpt of the text that the library draws."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(getattr(error, "reason", error)).split())  # of characters: no place
    said = ", ".join(filter(None, (error.context, error.problem)))
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}"


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML document. Every JSON document is a YAML document too.

    Args:
        text: the document; bytes are decoded as UTF-8.

    Raises:
        ValueError: with the reason as a predicate, such as `is not YAML (...)`.

    Example:
        >>> parse_yaml("source: code.jsonl\\nsamples: 700")
        {'source': 'code.jsonl', 'samples': 700}
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES} bytes")
    decoded = utf8(text)
    try:
        value = yaml.load(decoded, Loader=_Loader)
    except _Refused:
        raise
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML ({_reason(error)})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except Exception as error:  # constructors of tagged values raise what int() and others do
        raise ValueError(f"holds a value that cannot be read ({error})") from error
    check_values(value)
    return value
