"""Dequantizes the weights of GPTQ, AWQ and AutoRound, one matrix at a time.

Several tensors on disk make a matrix [out, in]: `qweight`, the codes packed into 32-bit words;
`qzeros` and `scales`, a zero point and a scale for every output and group of inputs; and `g_idx`,
the group of each input, where GPTQ's act-order (`desc_act`) leaves no runs of neighbors.
`files/packed_scheme.py` tells the variants apart.

An element is scale x (code - zero point), rounded once to the scales' dtype, as GPTQModel and
AutoRound compute it; loading then converts it to the dtype of the run.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reap_driver.files.packed_scheme import Packing, read_scheme
from reap_driver.load.packed_codes import plus_one, reorder, unpack, words_of
from reap_driver.load.tensor_reader import Dequantized, Readable, StoredTensor
from reap_kernels.errors import CheckpointError, UnsupportedModel

_CODES, _ZEROS, _SCALES, _GROUPS = "qweight", "qzeros", "scales", "g_idx"
_PARTS = (_CODES, _ZEROS, _SCALES, _GROUPS)
_DTYPES = {
    _CODES: ("I32",),
    _ZEROS: ("I32",),
    _SCALES: ("F16", "BF16", "F32"),
    _GROUPS: ("I32", "I64"),
}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of a word's codes, lowest bits first

_DAMAGED = "download the checkpoint again"
_REMEDY = "use the config.json and weights of one and the same checkpoint"


def plain_weights(
    method: str,
    tensors: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any],
    where: object,
    device: torch.device,
) -> dict[str, Readable]:
    """Reads a checkpoint of `method` ("gptq", "awq" or "auto-round"), as `methods.Reader` says it.

    Raises:
        UnsupportedModel: a format cannot be read.
        CheckpointError: tensors do not match each other or the settings.
    """
    packed: dict[str, dict[str, StoredTensor]] = {}
    names = set()
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        names.add(module)
        if leaf in _PARTS:
            packed.setdefault(module, {})[leaf] = tensor
    both = [module for module in packed if f"{module}.weight" in tensors]
    if both:
        parts = ", ".join(sorted(packed[min(both)]))
        raise CheckpointError(f"{where}: {min(both)} has both a weight and {parts}; {_DAMAGED}")
    scheme = read_scheme(method, quantization, names, f"{where}: quantization_config")
    plain: dict[str, Readable] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf not in _PARTS:
            plain[key] = tensor
        elif f"{module}.weight" not in plain:
            name = f"{where}: {module}"
            packing = scheme.of(module, name)
            plain[f"{module}.weight"] = Matrix(name, packed[module], packing, device)
    return plain


gptq = partial(plain_weights, "gptq")
awq = partial(plain_weights, "awq")
auto_round = partial(plain_weights, "auto-round")


class Matrix(Dequantized):
    """A matrix that is computed from its stored parts when it is indexed."""

    def __init__(
        self, name: str, parts: Mapping[str, StoredTensor], packing: Packing, device: torch.device
    ) -> None:
        _check_parts(name, parts, packing)
        self._packing = packing
        self._outputs = parts[_SCALES].get_shape()[1]
        self._inputs = _inputs(parts, packing)
        self._groups = -(-self._inputs // (packing.group or self._inputs or 1))
        self._check_shapes(name, parts)
        shape = self._outputs, self._inputs
        super().__init__(name, parts, shape, parts[_SCALES].get_dtype(), device)

    def _value(self, parts: Mapping[str, Tensor]) -> Tensor:
        # Codes and zero points are integers of at most 9 bits, which every dtype represents
        # exactly, and so are their differences: only the product is rounded.
        bits, awq, scales = self._packing.bits, self._packing.layout == "awq", parts[_SCALES]
        zeros = self._zero_points(parts[_ZEROS]).to(scales.dtype)
        if self._packing.zeros == "z - 1":
            zeros += 1
        if awq:
            codes = reorder(unpack(parts[_CODES].T, bits, self._outputs), _AWQ_ORDER)
        else:
            codes = unpack(parts[_CODES], bits, self._inputs).T
        values = codes.to(scales.dtype, memory_format=torch.contiguous_format)
        groups = self._groups_of_inputs(parts)
        for operation, by_group in ((torch.sub, zeros), (torch.mul, scales.T.contiguous())):
            if groups is None:
                grid = values.view(self._outputs, self._groups, -1)
                operation(grid, by_group[:, :, None], out=grid)
            else:
                operation(values, by_group.gather(1, groups.expand(values.shape)), out=values)
        return values

    def _zero_points(self, words: Tensor) -> Tensor:
        """[outputs, groups], as stored, or what GPTQModel makes of them."""
        bits, add = self._packing.bits, self._packing.zeros == "words - 1"
        if add and bits != 3:
            words = plus_one(words, bits)
        zeros = unpack(words.T, bits, self._outputs)
        if add and bits == 3:
            zeros = zeros + 1 & 7
        return reorder(zeros, _AWQ_ORDER) if self._packing.layout == "awq" else zeros

    def _groups_of_inputs(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """[inputs]: the number of each one's group; None if groups are runs of the same length."""
        wide = self._packing.group or self._inputs
        plain = torch.arange(self._inputs, device=self._device) // wide
        groups = parts[_GROUPS].long() if _GROUPS in parts else plain
        if not self._groups > int(groups.max()) >= int(groups.min()) >= 0:
            raise CheckpointError(
                f"{self._name}.{_GROUPS} has values from {int(groups.min())} to "
                f"{int(groups.max())}, but there are {self._groups} groups; {_DAMAGED}"
            )
        whole = self._inputs == self._groups * wide
        return None if whole and torch.equal(groups, plain) else groups

    def _check_shapes(self, name: str, parts: Mapping[str, StoredTensor]) -> None:
        bits, awq = self._packing.bits, self._packing.layout == "awq"
        across = words_of(self._outputs, bits)
        down = words_of(self._inputs, bits)
        expected = {
            _CODES: [self._inputs, across] if awq else [down, self._outputs],
            _ZEROS: [self._groups, across],
            _SCALES: [self._groups, self._outputs],
            _GROUPS: [self._inputs],
        }
        for leaf, part in parts.items():
            if part.get_shape() != expected[leaf]:
                raise CheckpointError(
                    f"{name}.{leaf} has shape {part.get_shape()}, not {expected[leaf]}, as "
                    f"{bits} bits in groups of {self._packing.group or 'all'} inputs "
                    f"({self._packing.layout}) make it for {self._outputs} outputs; {_REMEDY}"
                )
        if awq and self._outputs % len(_AWQ_ORDER):
            raise CheckpointError(
                f"{name} has {self._outputs} outputs, which AWQ cannot pack; a multiple of "
                f"{len(_AWQ_ORDER)} can be read: {_DAMAGED}"
            )


def _inputs(parts: Mapping[str, StoredTensor], packing: Packing) -> int:
    """How many inputs a matrix has: by `g_idx` if there is one, else as many as fill its words."""
    rows = parts[_CODES].get_shape()[0]
    if packing.layout == "awq":
        return rows
    if _GROUPS in parts:
        return parts[_GROUPS].get_shape()[0]
    return rows * 32 // packing.bits


def _check_parts(name: str, parts: Mapping[str, StoredTensor], packing: Packing) -> None:
    """Checks that the parts are there, with their dtypes and dimensions."""
    needed = (_CODES, _ZEROS, _SCALES, *((_GROUPS,) if packing.ordered else ()))
    missing = [leaf for leaf in needed if leaf not in parts]
    if packing.layout == "awq" and _GROUPS in parts:
        raise CheckpointError(f"{name} has a {_GROUPS}, which AWQ does not use; {_REMEDY}")
    if missing:
        raise CheckpointError(
            f"{name} has {', '.join(sorted(parts))}, but no {' and no '.join(missing)}; {_DAMAGED}"
        )
    for leaf, part in parts.items():
        if part.get_dtype() not in _DTYPES[leaf]:
            raise UnsupportedModel(
                f"{name}.{leaf} is {part.get_dtype()}; {' or '.join(_DTYPES[leaf])} can be read: "
                "convert the tensor"
            )
        dimensions = 1 if leaf == _GROUPS else 2
        if len(part.get_shape()) != dimensions or 0 in part.get_shape():
            raise UnsupportedModel(
                f"{name}.{leaf} has shape {part.get_shape()}; {dimensions} dimensions can be read: "
                "store the matrices of experts apart"
            )
