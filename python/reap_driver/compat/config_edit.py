"""Edits of the raw configuration files: expert counts and MTP fields.

The JSON is edited in place, field by field: writing it through a config class would rename fields
and move others (Qwen3's `num_experts` becomes `num_local_experts`), which older readers then miss.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from reap_driver.compat.config_file import COUNT_FIELDS, MTP_FIELDS

# Fields that say how many MTP layers there are, or that there are any.
_MTP_FIELDS = frozenset({*MTP_FIELDS, "mtp_num_hidden_layers", "mtp_num_layers", "use_mtp"})
Site = tuple[str, ...]  # path of a field, from the top of the file


def count_sites(config: Mapping[str, Any], experts: int) -> list[Site]:
    """Fields that hold the count, at any depth: the number itself, or a list of nothing but it."""
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
    """A copy of the configuration with another count at these fields (lists keep their length)."""
    edited = copy.deepcopy(dict(config))
    for site in sites:
        *path, name = site
        parent = _at(edited, path)
        value = parent.get(name)  # absent where the file relies on a default
        parent[name] = [after] * len(value) if isinstance(value, list) else after
    return edited


def clear_mtp(config: dict[str, Any]) -> None:
    """Set the fields that announce MTP layers to none, in place.

    Lists of one value a layer (Step-3.5's `layer_types`, `rope_theta`) that count the MTP layers in
    are cut behind the main layers: the config class does so only while the field says how many.
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
    """Keep the first entries of every list of this length; lists of token ids are not by layer."""
    for name, value in config.items():
        if isinstance(value, list) and len(value) == length and not name.endswith("_id"):
            config[name] = value[:kept]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ: dotted name -> (old value, new value). A changed quantization setting is
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
    """Every field of a configuration and of the configurations nested in it, quantization apart."""
    for name, value in config.items():
        if isinstance(value, dict) and name != "quantization_config":
            yield from _walk(value, (*path, name))
        elif not isinstance(value, dict):
            yield (*path, name), value


def _at(config: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The dictionary at a path."""
    for name in path:
        config = config.setdefault(name, {})
    return config
