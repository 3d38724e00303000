"""Dequantizes the tensor classes of torchao that store plain integers or 8-bit floats.

The metadata of a safetensors file describe each quantized `MODULE.weight`: its class, dtype, and
the block of elements that share a scale. Its tensors are `MODULE._weight_qdata`, `_weight_scale`
and, for integers, `_weight_zero_point`. An element is (code - zero point) x scale in float32,
rounded once to the dtype. Classes whose codes are packed for a kernel are refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap_driver.files.safetensors_file import read_header
from reap_driver.files.settings_checks import refuse
from reap_driver.load.tensor_reader import DTYPES, FLOATS, Dequantized, Readable, StoredTensor
from reap_kernels.documents import parse_json
from reap_kernels.errors import CheckpointError
from reap_kernels.schema import Anything, Int, ListOf, Mismatch, Record, Text, check, short

_CODES, _SCALE, _ZERO = "qdata", "scale", "zero_point"
# Classes that are read -> dtypes of their codes.
_CLASSES = {
    "Int8Tensor": ("I8",),
    "IntxUnpackedToInt8Tensor": ("I8",),
    "Float8Tensor": ("F8_E4M3", "F8_E5M2"),
}
_PLAIN = ("Tensor", "Parameter")
_DATA = Record(
    {"block_size": ListOf(Int(1), 2, 2), "dtype": Record({"_data": Text()}, open=True)}, open=True
)
_TENSOR = Record(
    {"_type": Text()}, {"_data": Anything(), "_tensor_data_names": ListOf(Text())}, open=True
)
_AGAIN = "download the checkpoint again"


def plain_weights(
    tensors: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any],
    where: object,
    device: torch.device,
) -> dict[str, Readable]:
    """The tensors of a checkpoint, with every matrix of torchao dequantized.

    The arguments are those of `load.methods.plain_weights`. The settings are not needed: the
    metadata of the files say which tensors are quantized, and how.

    Raises:
        UnsupportedModel: a tensor is of another class.
        CheckpointError: the parts of a matrix do not belong together.
    """
    described = _described(tensors, where)
    plain: dict[str, Readable] = dict(tensors)
    for name, found in described.items():
        module, _, leaf = name.rpartition(".")
        leaves = found["_tensor_data_names"]
        keys = {part: f"{module}._{leaf}_{part}" for part in leaves}
        lost = [key for key in keys.values() if key not in tensors]
        if lost:
            raise CheckpointError(f"{where}: {name} has no {min(lost)}; {_AGAIN}")
        if name in tensors:
            raise CheckpointError(f"{where}: {name} is stored with and without codes; {_AGAIN}")
        for key in keys.values():
            del plain[key]
        parts = {part: tensors[key] for part, key in keys.items()}
        plain[name] = Matrix(f"{where}: {name}", parts, found, device)
    return plain


class Matrix(Dequantized):
    """A matrix that is computed from its stored parts when it is indexed.

    Args:
        name: checkpoint and tensor, for error messages.
        parts: its tensors as stored.
        described: its entry in the metadata.
        device: where it is computed.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, StoredTensor],
        described: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        data = described["_data"]
        codes, shape = parts[_CODES], tuple(parts[_CODES].get_shape())
        block = data["block_size"]
        if codes.get_dtype() not in _CLASSES[described["_type"]] or len(shape) != 2:
            raise CheckpointError(
                f"{name} has codes {codes.get_dtype()} {list(shape)}, and a {described['_type']} "
                f"has {' or '.join(_CLASSES[described['_type']])} of a matrix; {_AGAIN}"
            )
        self._grid = shape[0] // block[0], shape[1] // block[1]
        whole = all(
            count * part == length
            for count, part, length in zip(self._grid, block, shape, strict=True)
        )
        if parts[_SCALE].get_dtype() not in FLOATS.values():
            raise CheckpointError(
                f"{name} has a {_SCALE} of {parts[_SCALE].get_dtype()}, and needs "
                f"{' or '.join(FLOATS.values())}; {_AGAIN}"
            )
        for leaf in sorted(parts.keys() - {_CODES}):
            found = parts[leaf].get_shape()
            if not whole or _without_ones(found) != _without_ones(self._grid):
                raise CheckpointError(
                    f"{name} has {leaf} {found} for {list(shape)} in blocks of {block}; {_AGAIN}"
                )
        super().__init__(name, parts, shape, FLOATS[data["dtype"]["_data"]], device)

    def _value(self, parts: Mapping[str, Tensor]) -> Tensor:
        (rows, columns), (tall, across) = self.get_shape(), self._grid
        grid = tall, 1, across, 1
        values = parts[_CODES].float().view(tall, rows // tall, across, columns // across)
        if _ZERO in parts:
            values -= parts[_ZERO].float().view(grid)
        values *= parts[_SCALE].float().view(grid)
        return values.view(rows, columns).to(DTYPES[self.get_dtype()])


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [length for length in shape if length != 1]


def _described(tensors: Mapping[str, StoredTensor], where: object) -> dict[str, dict[str, Any]]:
    """Name of a quantized tensor -> what the metadata of the files say of it."""
    found: dict[str, dict[str, Any]] = {}
    files: set[Path] = {tensor.file for tensor in tensors.values()}
    for path in sorted(files):
        for name, text in read_header(path).metadata.items():
            if '"_type"' not in text:  # of another kind, such as `format`
                continue
            entry = _entry(f"{path}: metadata of {short(name)}", text)
            if entry["_type"] not in _PLAIN:
                _check_entry(f"{where}: {name}", entry)
                found[name] = entry
    return found


def _entry(where: str, text: str) -> dict[str, Any]:
    """One description, checked."""
    try:
        entry: dict[str, Any] = parse_json(text.encode())
        check(entry, _TENSOR)
        if entry["_type"] in _CLASSES:
            check(entry.get("_data"), _DATA, "_data")
    except (ValueError, Mismatch) as error:
        raise CheckpointError(f"{where} are not readable ({error}); {_AGAIN}") from error
    return entry


def _check_entry(where: str, entry: Mapping[str, Any]) -> None:
    """Refuses classes, dtypes and parts that are not read."""
    kind = entry["_type"]
    if kind not in _CLASSES:
        refuse(f"{where} is a torchao {short(kind)}", ", ".join(_CLASSES))
    dtype, leaves = entry["_data"]["dtype"]["_data"], entry.get("_tensor_data_names") or []
    if dtype not in FLOATS:
        refuse(f"{where} has the dtype {short(dtype)}", ", ".join(FLOATS))
    if not {_CODES, _SCALE} <= set(leaves) <= {_CODES, _SCALE, _ZERO}:
        refuse(f"{where} has the parts {', '.join(leaves)}", f"{_CODES}, {_SCALE} and {_ZERO}")
