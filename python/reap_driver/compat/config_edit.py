"""Edits config.json as written: the number of experts, their width, and the fields of MTP layers.

Single fields are edited. Writing the file through a configuration class would rename and move
fields (Qwen3's `num_experts` becomes `num_local_experts`), and older readers would not find them.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from reap_driver.compat.config_file import COUNT_FIELDS, MTP_FIELDS, SHARED_COUNT_FIELDS

# Fields with the number of MTP layers, or whether there are any.
_MTP_FIELDS = frozenset({*MTP_FIELDS, "mtp_num_hidden_layers", "mtp_num_layers", "use_mtp"})
# Fields with the number of experts of MTP layers, where it is not that of the other layers.
MTP_COUNT_FIELDS = ("mtp_num_experts", "mtp_n_routed_experts")
Site = tuple[str, ...]  # path of a field from the top level of the file


def count_sites(config: Mapping[str, Any], experts: int) -> list[Site]:
    """Fields, at any depth, whose value is this number of experts, or a list of only this
    number.
    """
    sites = []
    for path, value in _walk(config):
        listed = isinstance(value, list) and value and all(item == experts for item in value)
        if (
            path[-1] in COUNT_FIELDS
            and not isinstance(value, bool)
            and (value == experts or listed)
        ):
            sites.append(path)
    return sites


def with_count(config: Mapping[str, Any], sites: list[Site], after: int) -> dict[str, Any]:
    """A copy of the configuration with another number in these fields; lists keep their length."""
    edited = copy.deepcopy(dict(config))
    for site in sites:
        *path, name = site
        parent = _at(edited, path)
        value = parent.get(name)  # None if the file relies on a default
        parent[name] = [after] * len(value) if isinstance(value, list) else after
    return edited


def width_sites(config: Mapping[str, Any], width: int) -> list[tuple[Site, Any]]:
    """(field, value) of fields, at any depth, that may say this width of a feed-forward network,
    or are a list that holds it.
    """
    return [
        (path, value)
        for path, value in _walk(config)
        if any(word in str(path[-1]) for word in ("intermediate", "ffn"))
        and not isinstance(value, bool)
        and (value == width or (isinstance(value, list) and width in value))
    ]


def shared_count_sites(
    config: Mapping[str, Any], complete: Mapping[str, Any], parent: Site
) -> list[tuple[Site, int]]:
    """(field, value) of fields of one object that say how many shared experts a layer has.

    Args:
        config: the configuration as written; its fields come first.
        complete: with every default.
        parent: path of the object.
    """
    found = {
        path: value
        for source in (complete, config)
        for path, value in _walk(source)
        if path[:-1] == parent and path[-1] in SHARED_COUNT_FIELDS and type(value) is int and value
    }
    written = {path for path, _ in _walk(config)}
    return sorted(found.items(), key=lambda item: item[0] not in written)


def with_values(config: Mapping[str, Any], values: Mapping[Site, Any]) -> dict[str, Any]:
    """A copy of the configuration with other values in these fields."""
    edited = copy.deepcopy(dict(config))
    for (*path, name), value in values.items():
        _at(edited, path)[name] = value
    return edited


def mtp_count_sites(config: Mapping[str, Any]) -> dict[Site, int]:
    """{field: number} of the fields, at any depth, that count the experts of MTP layers alone."""
    found = ((path, value) for path, value in _walk(config) if path[-1] in MTP_COUNT_FIELDS)
    return {path: value for path, value in found if type(value) is int}


def clear_mtp(config: dict[str, Any]) -> None:
    """Sets the fields of MTP layers to 0 or False, in place.

    Lists with one value per layer that include the MTP layers (Step-3.5's `layer_types` and
    `rope_theta`) lose those values: the configuration class drops them only if the field is set.
    """
    for path, value in list(_walk(config)):
        if path[-1] not in _MTP_FIELDS or not value:
            continue
        parent = _at(config, list(path[:-1]))
        parent[path[-1]] = False if isinstance(value, bool) else 0
        layers = parent.get("num_hidden_layers")
        if isinstance(layers, int) and not isinstance(value, bool):
            _cut_lists(parent, layers + value, layers)


def _cut_lists(config: dict[str, Any], length: int, kept: int) -> None:
    """Shortens every list of this length, except lists of token ids, which are not per layer."""
    for name, value in config.items():
        if isinstance(value, list) and len(value) == length and not name.endswith("_id"):
            config[name] = value[:kept]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ: dotted name -> (old value, new value). `quantization_config` counts as
    one field.
    """
    before, after = dict(_walk(old)), dict(_walk(new))
    for name in ("quantization_config",):
        before[(name,)], after[(name,)] = old.get(name), new.get(name)
    return {
        ".".join(path): (before.get(path), value)
        for path, value in after.items()
        if before.get(path) != value
    }


def _walk(config: Mapping[str, Any], path: Site = ()) -> Iterator[tuple[Site, Any]]:
    """(path, value) of every field, nested ones included, except those of `quantization_config`."""
    for name, value in config.items():
        if isinstance(value, dict) and name != "quantization_config":
            yield from _walk(value, (*path, name))
        elif not isinstance(value, dict):
            yield (*path, name), value


def _at(config: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The dictionary at a path, created where it is missing."""
    for name in path:
        config = config.setdefault(name, {})
    return config
