"""Files that are sealed by a digest, with content that their readers must refuse all the same."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reap_kernels.documents import Format, parse_json, to_json
from reap_kernels.schema import Record
from reap_kernels.tensor_files import read_tensors, write_tensors

GONE = object()  # in place of a field


class Lax(Format):
    """A format that takes any fields."""

    def _kind(self) -> Record:
        return Record(open=True)


def lax(form: Format) -> Lax:
    """The same format, any fields."""
    known = {field.name: getattr(form, field.name) for field in dataclasses.fields(form)}
    return Lax(**known)


def change_document(path: Path, form: Format, change: Mapping[str, Any]) -> None:
    """Replaces fields of a JSON file, and seals it again."""
    content = _changed(parse_json(path.read_bytes()), change)
    path.write_text(to_json(lax(form).complete(content)))


def change_tensors(
    path: Path, form: Format, change: Mapping[str, Any], tensors: Mapping[str, Tensor | None]
) -> None:
    """Replaces fields and tensors of a file of tensors, and seals it again; without a tensor that
    is None.
    """
    content, stored = read_tensors(path, lax(form))
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    kept = {name: t for name, t in {**stored, **tensors}.items() if t is not None}
    write_tensors(kept, path, lax(form), _changed(content, change))


def _changed(content: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**content, **change}
    return {n: value for n, value in changed.items() if n != "digest" and value is not GONE}
