"""Edits of the raw configuration files: expert counts, MTP fields, quantisation entries that name
experts.

The JSON is edited in place, field by field: writing it through a config class would rename fields
and move others (Qwen3's `num_experts` becomes `num_local_experts`), which older readers then miss.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reap_driver.checkpoint.lists import ExpertList, split_layer
from reap_driver.compat.config_file import COUNT_FIELDS
from reap_driver.compat.load_pruned import SETTINGS
from reap_kernels.errors import CheckpointError

# Fields that say how many MTP layers there are, or that there are any.
_MTP_FIELDS = frozenset(
    {
        "num_nextn_predict_layers",
        "num_mtp_layers",
        "num_mtp_modules",
        "mtp_num_hidden_layers",
        "mtp_num_layers",
        "use_mtp",
    }
)
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


def with_counts(
    config: Mapping[str, Any],
    sites: list[Site],
    counts: Mapping[str, int],
    fields: Sequence[Site],
) -> dict[str, Any]:
    """A copy of the configuration that gives every layer a number of experts of its own.

    Equal numbers are said by the fields that count alone. Otherwise these say the largest, and the
    settings that `load_pruned` reads say all.

    Args:
        config: as written.
        sites: its fields that count the layers' experts.
        counts: number of experts, by layer.
        fields: what the same fields are called by the configuration's class.
    """
    edited = with_count(config, sites, max(counts.values()))
    edited.pop(SETTINGS, None)
    if len(set(counts.values())) > 1:
        names = [".".join(field) for field in fields]
        edited[SETTINGS] = {"count_fields": names, "counts": dict(counts)}
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


class ExpertNames:
    """Rewrites names of experts inside quantisation settings: ignore lists, per-module options.

    Args:
        number: old index -> new index, by prefix; removed experts are absent.
    """

    def __init__(self, number: Mapping[str, Mapping[int, int]]) -> None:
        # Tools disagree on what comes before `layers.3`, so names are matched from there on.
        self._number = {}
        for prefix, numbers in number.items():
            root, rest = split_layer(prefix + "0.")
            tail = ".".join(root.split(".")[-3:]) + rest[: -len("0.")]
            self._number[tail] = numbers
        self._pattern = re.compile(
            r"(?:(?<=^)|(?<=[.:^]))("
            + "|".join(map(re.escape, self._number))
            + r")(\d+)(?=$|[.:$])"
        )

    def rewrite(self, value: Any, where: str) -> Any:
        """The same JSON value with experts renumbered and entries of removed experts dropped.

        Raises:
            CheckpointError: an entry names an expert by index for no layer in particular.
        """
        if isinstance(value, dict):
            pairs = ((self._name(k, where), self.rewrite(v, where)) for k, v in value.items())
            return {k: v for k, v in pairs if k is not None}
        if isinstance(value, list):
            items = (
                self._name(item, where) if isinstance(item, str) else self.rewrite(item, where)
                for item in value
            )
            return [item for item in items if item is not None]
        return value

    def _name(self, name: str, where: str) -> str | None:
        """One name (or regular expression of a name), None if it belongs to a removed expert."""
        plain = name.replace(r"\.", ".")
        match = self._pattern.search(plain) if self._number else None
        if match is None:
            if re.search(r"\bexperts\.\d+(?=$|[.:$])", plain) and "layers.*" in plain.replace(
                r"\d+", "*"
            ):
                raise CheckpointError(
                    f"{where}: entry {name!r} names one expert in every layer, but each layer "
                    "keeps other experts; "
                    "spell the entry out by layer."
                )
            return name
        new = self._number[match.group(1)].get(int(match.group(2)))
        if new is None:
            return None
        renamed = plain[: match.start(2)] + str(new) + plain[match.end(2) :]
        return renamed.replace(".", r"\.") if r"\." in name else renamed


def expert_numbers(
    lists: Mapping[str, ExpertList], renamed: Mapping[str, str]
) -> dict[str, dict[int, int]]:
    """Old to new index of each list, read off the decided names (old key -> new key)."""
    numbers: dict[str, dict[int, int]] = {}
    for prefix, experts in lists.items():
        numbers[prefix] = {
            index: int(renamed[key][len(prefix) :].partition(".")[0])
            for key, index in experts.keys.items()
            if key in renamed
        }
    return numbers


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ: dotted name -> (old value, new value). A changed quantisation setting is
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
    """Every field of a configuration and of the configurations nested in it, quantisation apart."""
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
