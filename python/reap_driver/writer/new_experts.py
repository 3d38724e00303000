"""New values for experts on disk: computed in the model's layout, stored in that of the source.

What a layer's experts become is written through the views of its adapter, in the dtype of the
source, and the library's own conversion, reversed, gives the tensors on disk. So nothing here
depends on an architecture or on how a checkpoint stores experts. One part of one layer is in memory
at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from reap_driver.compat.conversion import Group, KeyMap
from reap_driver.files.quantization import Quantization
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.model.discover import MoELayer
from reap_driver.model.expert_parts import DOWN, NewExperts, fill, holders
from reap_kernels.errors import UnsupportedModel
from reap_kernels.files import named

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_Unit = tuple[tuple[str, ...], str]  # layers whose experts are converted together, and a part


@dataclass(frozen=True)
class Side:
    """A model and the names of its tensors on disk.

    Attributes:
        keys: its key rules.
        layers: name -> its MoE layers.
        tensors: disk key -> the tensor of the source that holds it, or held it before experts were
            numbered anew.
    """

    keys: KeyMap
    layers: Mapping[str, MoELayer]
    tensors: Mapping[str, TensorEntry]


class ExpertValues:
    """The tensors on disk that hold experts which change, and their values.

    Args:
        old, new: the model of the source, and the smaller one.
        changes: what the experts of each layer become; other layers are left alone.
        down: layer -> its new down projections [E', H, I'] (out x in); read once each.

    Raises:
        UnsupportedModel: new values cannot be written in the layout of the source.
    """

    def __init__(
        self,
        old: Side,
        new: Side,
        changes: Mapping[str, NewExperts],
        down: Mapping[str, Tensor],
    ) -> None:
        self._old, self._new, self._changes, self._down = old, new, changes, down
        self._sources = self._units(old)
        self._targets = self._units(new)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key in the output -> shape, of every tensor that is computed."""
        found: dict[str, tuple[int, ...]] = {}
        shapes = self._new.keys.shapes
        for groups in self._targets.values():
            for group in groups:
                empty = {name: torch.empty(shapes[name], device="meta") for name in group.names}
                made = self._new.keys.to_disk(group, empty)
                found |= {key: tuple(tensor.shape) for key, tensor in made.items()}
        return found

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Key in the output -> values, group by group."""
        for unit, groups in self._targets.items():
            values = self._values(unit)
            for group in groups:
                held = {name: values.pop(name) for name in group.names}
                yield self._new.keys.to_disk(group, held)

    def _units(self, side: Side) -> dict[_Unit, list[Group]]:
        """The groups of a side's disk tensors, by layers and part."""
        parts: dict[str, tuple[str, str]] = {}  # tensor of the model -> layer and part
        for name, change in self._changes.items():
            held = holders(side.layers[name]).items()
            parts |= {tensor: (name, part) for tensor, part in held if part in change.parts}
        found: dict[_Unit, list[Group]] = {}
        for group in side.keys.groups(side.tensors, self._changes):
            inside = [parts[name] for name in group.names if name in parts]
            if not inside:
                continue
            layers, kinds = dict.fromkeys(la for la, _ in inside), {part for _, part in inside}
            if len(inside) != len(group.names) or len(kinds) != 1:
                raise UnsupportedModel(
                    f"{next(iter(group.keys))}: holds {' and '.join(group.names)} in one tensor, "
                    "of which only a part changes; apply plans that remove whole experts only."
                )
            found.setdefault((tuple(layers), kinds.pop()), []).append(group)
        covered = {name for groups in found.values() for group in groups for name in group.names}
        for name in parts.keys() - covered:
            raise UnsupportedModel(
                f"{name}: no tensor on disk is known to hold it, so new values cannot be written; "
                "apply plans that remove whole experts only."
            )
        return found

    def _values(self, unit: _Unit) -> dict[str, Tensor]:
        """Tensor of the smaller model -> its values, of one part."""
        layers, part = unit
        dtype = self._dtype(unit)
        shapes = self._new.keys.shapes
        names = [name for group in self._targets[unit] for name in group.names]
        new = {name: torch.zeros(shapes[name], dtype=dtype) for name in names}
        old = {} if part == DOWN else self._read(unit)
        for layer in layers:
            inside = _within(new, layer)
            source = (
                self._down[layer]
                if part == DOWN
                else (self._old.layers[layer], _within(old, layer))
            )
            fill(self._new.layers[layer], part, inside, self._changes[layer], source)
        return new

    def _dtype(self, unit: _Unit) -> torch.dtype:
        """The dtype of a part on disk."""
        keys = [key for group in self._sources[unit] for key in group.keys]
        found = {self._old.tensors[key].dtype for key in keys}
        if len(found) > 1 or not found <= _DTYPES.keys():
            raise UnsupportedModel(
                f"{keys[0]}: the experts' tensors are stored as {', '.join(sorted(found))}, and "
                "new values are written in one of BF16, F16, F32 and F64; apply the plan to a "
                "checkpoint in one of them, and quantize the result."
            )
        return _DTYPES[found.pop()]

    def _read(self, unit: _Unit) -> dict[str, Tensor]:
        """Tensor of the original model -> its values, of one part."""
        found: dict[str, Tensor] = {}
        for group in self._sources[unit]:
            entries = {key: self._old.tensors[key] for key in group.keys}
            found |= self._old.keys.to_model(group, read_values(entries))
        return found


def refuse_quantized(folder: Path, quantization: Quantization) -> None:
    """Raises UnsupportedModel for a checkpoint that a quantizer wrote.

    Its codes, scales and blocks are of the old values and the old width, and engines read all
    experts of a layer in one format.
    """
    if quantization.method is not None or quantization.settings:
        raise UnsupportedModel(
            f"{folder}: is quantized ({quantization}), and new values of experts are "
            "written as BF16, F16, F32 or F64 numbers only; apply the plan to the checkpoint it "
            "was quantized from, and quantize the result."
        )


def _within(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}


def read_values(entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """Values of tensors of the source, by their keys there."""
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(entry.file for entry in entries.values()):
        with named(path), safe_open(path, "pt") as file:
            found |= {k: file.get_tensor(k) for k, entry in entries.items() if entry.file == path}
    return found
