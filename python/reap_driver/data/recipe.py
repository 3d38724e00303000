"""Recipes: mixes of calibration data, written in a YAML or JSON file or included in the package.

A recipe is a list of sources, or an object with `sources` and a `description`. A source has the
fields of `--data [group=]SOURCE[:BUDGET]` and, for a data set of the hub, a few more:

    sources:
      - source: theblackcat102/evol-codealpaca-v1
        group: code
        samples: 700
      - source: open-r1/Mixture-of-Thoughts
        subset: math
        split: train
        revision: main
        files: [math/train-00000-of-00004.parquet]
        tokens: 2M
      - source: agents.jsonl.gz
        tools: [{name: bash, description: Runs a command, parameters: {...}}]

Only `source` is required; paths are relative to the recipe file. `tools` applies to records that
list none themselves. Of YAML, only what JSON can express is read (`base.yaml_text`).
"""

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from reap_driver.base.yaml_text import parse_yaml
from reap_driver.compat.library_errors import one_line
from reap_driver.data.source import (
    DataSource,
    HubDataset,
    default_group,
    locate,
    token_count,
)
from reap_kernels.documents import parse_json, read_bytes
from reap_kernels.errors import DataError
from reap_kernels.files import is_file
from reap_kernels.schema import short

_LARGEST = 2**18  # bytes; recipes in use have a few thousand
_TOP = ("description", "sources")
_HUB_KEYS = ("subset", "split", "revision", "files")
_KEYS = ("source", "group", "samples", "tokens", "tools", *_HUB_KEYS)


def recipe_names() -> list[str]:
    """Names of the recipes that the package includes."""
    return sorted(_included())


def load_recipe(path: str | Path) -> list[DataSource]:
    """The sources of a recipe, in its order.

    Args:
        path: a .yaml, .yml or .json file, or the name of a recipe that the package includes.

    Raises:
        DataError: the file does not exist or is not a recipe, or a source has an unknown key, an
            invalid value or a location that does not exist. The message names file, source and key.

    Example:
        >>> load_recipe("reap-coding")[0].name
        'theblackcat102/evol-codealpaca-v1'
    """
    file = Path(path)
    if not is_file(file):
        included = _included()
        if str(path) not in included:
            raise DataError(
                f"recipe '{one_line(str(path))}': no such file; give a .yaml or .json file, or "
                f"one of {', '.join(sorted(included))}"
            )
        file = included[str(path)]
    content = _parse(file)
    if isinstance(content, dict):
        _check_keys(f"recipe {file}", content, _TOP)
        content = content.get("sources")
    if not isinstance(content, list) or not content:
        raise DataError(
            f"recipe {file}: has no list of sources; give `sources`, a list of objects with "
            f"{', '.join(_KEYS)}"
        )
    return [
        _source(f"recipe {file}, source {number}", entry, file.parent)
        for number, entry in enumerate(content, start=1)
    ]


def _included() -> dict[str, Path]:
    folder = Path(str(resources.files("reap_driver.data") / "recipes"))
    return {file.stem: file for file in folder.glob("*.yaml")}


def _parse(file: Path) -> Any:
    try:
        content = read_bytes(file, _LARGEST)
        return parse_json(content) if file.suffix == ".json" else parse_yaml(content)
    except ValueError as error:
        raise DataError(f"recipe {file} {error}; correct it") from error


def _check_keys(what: str, entry: dict[Any, Any], known: tuple[str, ...]) -> None:
    unknown = [str(key) for key in entry if key not in known]
    if unknown:
        raise DataError(
            f"{what}: does not know {one_line(', '.join(unknown))}; the keys are {', '.join(known)}"
        )


def _source(what: str, entry: Any, folder: Path) -> DataSource:
    if not isinstance(entry, dict):
        raise DataError(f"{what}: is {short(entry)}; give an object with {', '.join(_KEYS)}")
    _check_keys(what, entry, _KEYS)
    if "source" not in entry:
        raise DataError(f"{what}: has no `source`; give a path or a hub data set")
    location = locate(_text(what, entry, "source") or "", folder, what)
    asked = {key: _text(what, entry, key) for key in ("subset", "split", "revision")}
    location = _narrowed(what, location, {**asked, "files": _files(what, entry)})
    return DataSource(
        location,
        _text(what, entry, "group") or default_group(location),
        _number(what, entry, "samples"),
        _number(what, entry, "tokens"),
        _tools(what, entry),
    )


def _narrowed(what: str, location: Path | HubDataset, asked: dict[str, Any]) -> Path | HubDataset:
    """The data set, restricted by the recipe's `subset`, `split`, `revision` and `files`."""
    asked = {key: value for key, value in asked.items() if value}
    if isinstance(location, Path):
        if asked:
            raise DataError(
                f"{what}: {', '.join(asked)} does not apply to {location}, which is a local file "
                "or folder; leave it out"
            )
        return location
    twice = [key for key in asked if getattr(location, key)]
    if twice:
        raise DataError(
            f"{what}: names {', '.join(twice)} in `source` and as a key; leave one of them out"
        )
    return replace(location, **asked)


def _text(what: str, entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise DataError(
            f"{what}: {key} is {short(value)}; it must be a text, in quotes where needed"
        )
    return value


def _files(what: str, entry: dict[str, Any]) -> tuple[str, ...]:
    value = entry.get("files") or []
    if not isinstance(value, list) or not all(item and isinstance(item, str) for item in value):
        raise DataError(f"{what}: files is {short(value)}; it must be a list of names")
    return tuple(value)


def _tools(what: str, entry: dict[str, Any]) -> str | None:
    value = entry.get("tools")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{what}: tools is {short(value)}; it must be a list of objects")
    return json.dumps(value)


def _number(what: str, entry: dict[str, Any], key: str) -> int | None:
    value = entry.get(key)
    if key == "tokens" and isinstance(value, str):
        value = token_count(value.removesuffix("tok") + "tok")
    if value is None and entry.get(key) is None:
        return None
    if type(value) is not int or value < 1:
        more = ", or such as 2M" if key == "tokens" else ""
        raise DataError(
            f"{what}: {key} is {short(entry[key])}; it must be a whole number above 0{more}"
        )
    return value
