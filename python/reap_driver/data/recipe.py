"""Recipes: mixes of calibration data, written in a YAML or JSON file or included in the package.

A recipe is a list of sources, or an object with `sources`, a `description` and `options`, the
values of options that a run with it has unless it is given others. A source has the fields of
`--data [group=]SOURCE[:BUDGET]` and, for a data set of the hub, a few more:

    description: Code, reasoning and my agents
    options: {packing: none, max_len: 16384, ratio: 0.5}
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
list none themselves. Of YAML, only what JSON can express is read (`base.yaml_text`). Which options
there are is known to `workflow.recipes`.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from reap_kernels.documents import parse_json, read_bytes, utf8
from reap_kernels.errors import DataError
from reap_kernels.files import is_file
from reap_kernels.schema import short

_LARGEST = 2**18  # bytes; recipes in use have a few thousand
_TOP = ("description", "options", "sources")
_HUB_KEYS = ("subset", "split", "revision", "files")
_KEYS = ("source", "group", "samples", "tokens", "tools", *_HUB_KEYS)


@dataclass(frozen=True)
class Recipe:
    """A mix of calibration data, and values of options.

    Attributes:
        name: as it was asked for: a name of the package, or a path.
        sources: in the recipe's order.
        description: in a line; empty if there is none.
        options: by the names that Python's calls have.
        digest: `sha256:` and the digest of the file.
        text: the file.

    Example:
        >>> rd.load_recipe("reap-coding").description
        'Code, tool calls and coding agents, 1,360 records'
    """

    name: str
    sources: tuple[DataSource, ...]
    description: str
    options: Mapping[str, Any]
    digest: str
    text: str = field(repr=False)

    def facts(self) -> dict[str, Any]:
        """The recipe as `reap-kernels recipe --json` prints it."""
        sources = [
            {"source": one.name, "group": one.group, "samples": one.samples, "tokens": one.tokens}
            for one in self.sources
        ]
        return {
            "name": self.name,
            "description": self.description,
            "digest": self.digest,
            "options": dict(self.options),
            "sources": [{k: v for k, v in one.items() if v is not None} for one in sources],
        }


def read_recipe(path: str | Path) -> Recipe:
    """A recipe, with its options as they are written.

    Args:
        path: a .yaml, .yml or .json file, or the name of a recipe that the package includes.

    Raises:
        DataError: the file does not exist or is not a recipe, or a source has an unknown key, an
            invalid value or a location that does not exist. The message names file, source and key.
    """
    file = Path(path)
    if not is_file(file):
        known = included()
        if str(path) not in known:
            close = difflib.get_close_matches(str(path), known, 1)
            raise DataError(
                f"recipe '{one_line(str(path))}': no such file"
                + (f" (did you mean {close[0]}?)" if close else "")
                + "; give a .yaml or .json file, or one of "
                + ", ".join(sorted(known))
            )
        file = known[str(path)]
    content, text, digest = _parse(file)
    top: dict[str, Any] = content if isinstance(content, dict) else {"sources": content}
    what = f"recipe {file}"
    _check_keys(what, top, _TOP)
    listed, options = top.get("sources"), top.get("options") or {}
    if not isinstance(listed, list) or not listed:
        raise DataError(
            f"{what}: has no list of sources; give `sources`, a list of objects with "
            f"{', '.join(_KEYS)}"
        )
    if not isinstance(options, dict):
        raise DataError(
            f"{what}: options is {short(options)}; give names and values, such as seq_len: 2048"
        )
    sources = [
        replace(_source(f"{what}, source {number}", entry, file.parent), recipe=(str(path), digest))
        for number, entry in enumerate(listed, start=1)
    ]
    beside = {key: _beside(file, value) for key, value in options.items()}
    return Recipe(
        str(path), tuple(sources), _text(what, top, "description") or "", beside, digest, text
    )


def _beside(file: Path, value: Any) -> Any:
    """The value of an option; the path of a file beside the recipe, if it names one."""
    named = isinstance(value, str) and Path(value).suffix and is_file(file.parent / value)
    return str(file.parent / value) if named else value


def included() -> dict[str, Path]:
    """{name: file} of the recipes that the package includes."""
    folder = Path(str(resources.files("reap_driver.data") / "recipes"))
    return {file.stem: file for file in folder.glob("*.yaml")}


def _parse(file: Path) -> tuple[Any, str, str]:
    """(content, text, digest) of a file."""
    try:
        content = read_bytes(file, _LARGEST)
        value = parse_json(content) if file.suffix == ".json" else parse_yaml(content)
        return value, utf8(content), f"sha256:{hashlib.sha256(content).hexdigest()}"
    except ValueError as error:
        raise DataError(f"recipe {file} {error}; correct it") from error


def _check_keys(what: str, entry: dict[Any, Any], known: tuple[str, ...]) -> None:
    unknown = [str(key) for key in entry if key not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        raise DataError(
            f"{what}: does not know {one_line(', '.join(unknown))}"
            + (f" (did you mean {close[0]}?)" if close else "")
            + f"; the keys are {', '.join(known)}"
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
