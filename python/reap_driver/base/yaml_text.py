"""YAML that comes from elsewhere, as the values JSON has, within the limits of JSON.

Recipes, files of ratios and the front matter of a README need no more of YAML than that. Refused
are anchors and aliases, by which a short text stands for an endless value, names given twice, and
what `reap_kernels.documents` refuses. Dates stay the text they are written as.
"""

from typing import Any

import yaml  # type: ignore[import-untyped]

from reap_kernels.documents import check_values, utf8
from reap_kernels.schema import short

MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases, and without types that JSON does not have."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise ValueError(
                f"has the anchor or alias {short(event.anchor)} in line "
                f"{event.start_mark.line + 1}, which is not read: write the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name, (key, _) in zip(names, node.value, strict=True):
            if type(name) not in (str, int):
                raise ValueError(
                    f"has the name {short(name)} in line {key.start_mark.line + 1}; names are texts"
                )
        if len({str(name) for name in names}) != len(names):
            raise ValueError(f"has a name twice in the object of line {node.start_mark.line + 1}")
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return {str(name): value for name, value in found.items()}


_JSON_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in _JSON_TYPES]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: made
    for tag, made in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _JSON_TYPES
}


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML document; JSON is YAML too.

    Args:
        text: UTF-8 if bytes.

    Raises:
        ValueError: with the reason in plain words, such as `is not YAML (...)`.

    Example:
        >>> parse_yaml("source: code.jsonl\\nsamples: 700")
        {'source': 'code.jsonl', 'samples': 700}
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES} bytes")
    decoded = utf8(text)
    try:
        value = yaml.load(decoded, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    check_values(value)
    return value
