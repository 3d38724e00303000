"""Dequantizes what bitsandbytes stores: 4-bit codes of blocks, and 8-bit integers of rows.

4 bits (nf4, fp4): `weight` holds all codes of the matrix, two in a byte, the first in the high
bits. Beside it `weight.absmax` scales every block of the flattened matrix,
`weight.quant_map` has the codes' values, and `weight.quant_state.bitsandbytes__nf4` is JSON with
shape, block size and dtype. With double quantization absmax is itself in codes of a byte, whose
values, scales and offset are `weight.nested_quant_map`, `weight.nested_absmax` and a number in the
JSON. An element is value x absmax in float32, rounded once to the JSON's dtype.

8 bits: an element is `weight` x `SCB` of its row x 1/127, multiplied in this order in float32.
Products of outliers with unquantized inputs concern activations alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reap_driver.files.settings_checks import refuse
from reap_driver.load.code_tables import values_of_bytes
from reap_driver.load.tensor_reader import (
    DTYPES,
    FLOATS,
    Dequantized,
    Readable,
    StoredTensor,
    start,
)
from reap_kernels.documents import parse_json
from reap_kernels.errors import CheckpointError
from reap_kernels.schema import Int, ListOf, Real, Record, Text, check

_STATES = tuple(f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_ABSMAX, _MAP = "absmax", "quant_map"
_NESTED_ABSMAX, _NESTED_MAP = "nested_absmax", "nested_quant_map"
_CODES, _ROW_SCALES, _ORDER = "weight", "SCB", "weight_format"
_PARTS = (_ABSMAX, _MAP, _NESTED_ABSMAX, _NESTED_MAP, *_STATES)
# Small, and needed to know the shape of a matrix and whether it can be read.
_READ_FIRST = (*_STATES, _ORDER)
_UNIT = 7.874015718698502e-3  # 1 / 127 as the library writes it
_LONGEST_STATE = 1 << 16  # bytes
_AGAIN = "download the checkpoint again"
_BYTES = {"U8", "I8", "U16", "I16", "U32", "I32", "BF16", "F16", "F32", "F64"}  # `quant_storage`
_STATE = Record(
    {
        "quant_type": Text(choices=("nf4", "fp4")),
        "blocksize": Int(1, 1 << 20),
        "dtype": Text(choices=tuple(FLOATS)),
        "shape": ListOf(Int(1)),
    },
    optional={"nested_blocksize": Int(1, 1 << 20), "nested_offset": Real()},
    open=True,
)


def plain_weights(
    tensors: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any],
    where: object,
    device: torch.device,
) -> dict[str, Readable]:
    """The tensors of a checkpoint, with every matrix of bitsandbytes dequantized.

    The arguments are those of `load.methods.plain_weights`. The settings are not needed: layers
    that they exclude are stored as ordinary floats, and the tensors of others say all. What
    describes a matrix, a few hundred bytes, is read now.

    Raises:
        UnsupportedModel: a matrix is stored in another form.
        CheckpointError: the parts of a matrix do not belong together.
    """
    matrices: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in tensors.items():
        owner, leaf = _owner(key)
        if owner:
            matrices.setdefault(owner, {})[leaf] = tensor
    start(tensors, (key for key in tensors if _owner(key)[1] in _READ_FIRST))
    plain: dict[str, Readable] = {}
    for key, tensor in tensors.items():
        owner = _owner(key)[0] or key
        if owner not in tensors:
            raise CheckpointError(f"{where}: has {key}, but no {owner}; {_AGAIN}")
        if key != owner:
            continue
        parts = {_CODES: tensor, **matrices.get(key, {})}
        kind = Rows if _ROW_SCALES in parts else Blocks
        plain[key] = tensor if len(parts) == 1 else kind(f"{where}: {key}", parts, device)
    return plain


class Blocks(Dequantized):
    """A matrix of 4-bit codes that is computed from its stored parts when it is indexed."""

    def __init__(self, name: str, parts: Mapping[str, StoredTensor], device: torch.device) -> None:
        found = [leaf for leaf in parts if leaf in _STATES]
        if len(found) != 1:
            raise CheckpointError(f"{name} has {len(found)} quant_state, and needs one; {_AGAIN}")
        self._state = _read_state(f"{name}.{found[0]}", parts[found[0]])
        values = {leaf: part for leaf, part in parts.items() if leaf not in _STATES}
        shape = tuple(self._state["shape"])
        if len(shape) != 2:
            refuse(f"{name} has the shape {list(shape)}", "matrices, each expert's by itself,")
        self._nested = _NESTED_ABSMAX in parts
        _check_blocks(name, values, self._state, self._nested)
        super().__init__(name, values, shape, FLOATS[self._state["dtype"]], device)

    def _value(self, parts: Mapping[str, Tensor]) -> Tensor:
        rows, columns = self.get_shape()
        parts = {leaf: part.flatten() for leaf, part in parts.items()}
        scales = parts[_ABSMAX]
        if self._nested:
            size = self._state["nested_blocksize"]
            scales = parts[_NESTED_MAP].float()[scales.int()]
            scales = _scaled(scales, parts[_NESTED_ABSMAX].float(), size)
            scales = scales + self._state["nested_offset"]
        codes = parts[_CODES].view(torch.uint8)
        values = values_of_bytes(codes, parts[_MAP], low_first=False)[: rows * columns]
        made = _scaled(values, scales.float(), self._state["blocksize"])
        return made.view(rows, columns).to(DTYPES[self.get_dtype()])


class Rows(Dequantized):
    """A matrix of 8-bit integers that is computed from its stored parts when it is indexed."""

    def __init__(self, name: str, parts: Mapping[str, StoredTensor], device: torch.device) -> None:
        codes, scales = parts[_CODES], parts[_ROW_SCALES]
        shape = codes.get_shape()
        fits = len(shape) == 2 and scales.get_shape() == shape[:1]
        if not fits or codes.get_dtype() != "I8" or scales.get_dtype() != "F32":
            raise CheckpointError(
                f"{name} is {codes.get_dtype()} {shape} with {_ROW_SCALES} {scales.get_dtype()} "
                f"{scales.get_shape()}; bitsandbytes has I8 [rows, columns] with F32 [rows]: "
                f"{_AGAIN}"
            )
        order = parts[_ORDER][...] if _ORDER in parts else torch.zeros(())
        if order.any():
            refuse(f"{name} has {_ORDER} {order.tolist()}, an order for one kind of GPU", "0, rows")
        super().__init__(name, {_CODES: codes, _ROW_SCALES: scales}, tuple(shape), "F32", device)

    def _value(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts[_CODES] * parts[_ROW_SCALES].view(-1, 1) * _UNIT


def _owner(key: str) -> tuple[str, str]:
    """(key of the matrix, leaf) of a part beside its codes; ("", "") for other tensors."""
    for leaf in _PARTS:
        if key.endswith(f".{leaf}"):
            return key.removesuffix(f".{leaf}"), leaf
    module, _, leaf = key.rpartition(".")
    return (f"{module}.{_CODES}", leaf) if leaf in (_ROW_SCALES, _ORDER) else ("", "")


def _scaled(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Values [n] in float32, in place, by the scale of their block of `size`."""
    whole = len(values) // size * size
    values[:whole].view(-1, size).mul_(scales[: whole // size, None])
    if whole < len(values):
        values[whole:].mul_(scales[-1])
    return values


def _read_state(name: str, stored: StoredTensor) -> dict[str, Any]:
    """The JSON of a 4-bit matrix, checked."""
    try:
        if stored.get_dtype() != "U8" or stored.nbytes > _LONGEST_STATE:
            raise ValueError(f"it is {stored.get_dtype()} {stored.get_shape()}")
        found = parse_json(bytes(stored[...].flatten().tolist()))
        check(found, _STATE)
    except ValueError as error:
        raise CheckpointError(f"{name} is not readable ({error}); {_AGAIN}") from error
    state: dict[str, Any] = found
    return state


def _check_blocks(
    name: str, parts: Mapping[str, StoredTensor], state: Mapping[str, Any], nested: bool
) -> None:
    """Raises an error unless the parts have the dtypes and lengths that the JSON says."""
    rows, columns = state["shape"]
    blocks = -(-rows * columns // state["blocksize"])
    needed = {_ABSMAX: ("U8" if nested else "F32", blocks), _MAP: ("F32", 16)}
    if nested:
        if not {"nested_blocksize", "nested_offset"} <= state.keys():
            raise CheckpointError(f"{name} has a {_NESTED_ABSMAX}, but no offset of it; {_AGAIN}")
        needed[_NESTED_ABSMAX] = "F32", -(-blocks // state["nested_blocksize"])
        needed[_NESTED_MAP] = "F32", 256
    for leaf, (dtype, length) in needed.items():
        part = parts.get(leaf)
        found = "none" if part is None else f"{part.get_dtype()} {part.get_shape()}"
        if part is None or (part.get_dtype(), math.prod(part.get_shape())) != (dtype, length):
            raise CheckpointError(
                f"{name}.{leaf} is {found}; a matrix {[rows, columns]} in blocks of "
                f"{state['blocksize']} has {dtype} [{length}]: {_AGAIN}"
            )
    codes = parts[_CODES]
    if codes.get_dtype() not in _BYTES or codes.get_shape()[-1:] != [1]:
        refuse(f"{name} is {codes.get_dtype()} {codes.get_shape()}", "4-bit codes in one column")
    if codes.nbytes != -(-rows * columns // 2):
        raise CheckpointError(
            f"{name} has {codes.nbytes} bytes of codes for {[rows, columns]}; {_AGAIN}"
        )
