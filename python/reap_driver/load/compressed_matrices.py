"""Dequantizes the weights of compressed-tensors, one matrix at a time.

Several tensors on disk make one matrix: `weight_packed` (4- or 8-bit integers in 32-bit words) or
`weight` (8-bit integers or floats), `weight_scale`, and optionally `weight_shape` and
`weight_zero_point`. An element is (code - zero point) x scale, computed in float32 and rounded once
to the scales' dtype, as the compressed-tensors library does; loading then converts it to the dtype
of the run. The quantization of activations does not matter here. NVFP4 is in `load.nvfp4`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from reap_driver.files.compressed_scheme import Scheme, read_scheme
from reap_driver.files.quantization import REMEDY
from reap_driver.load import nvfp4
from reap_driver.load.packed_codes import WORD, words_of
from reap_driver.load.tensor_reader import Dequantized, Readable, StoredTensor, is_plain
from reap_kernels import dequantize
from reap_kernels.errors import CheckpointError, UnsupportedModel
from reap_kernels.quantized import Quantized

_PACKED, _PLAIN, _SCALE = "weight_packed", "weight", "weight_scale"
_SHAPE, _ZERO, _ORDER = "weight_shape", "weight_zero_point", "weight_g_idx"
_WHOLE = nvfp4.COMPRESSED.whole
_PARTS = (_PACKED, _SCALE, _SHAPE, _ZERO, _ORDER, _WHOLE)
# Parameters of a layer's inputs and outputs, which are not needed for its weights.
_ACTIVATIONS = (
    *("input_scale", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point"),
)

_CODES = ("I8", "F8_E4M3")
_SCALES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Operation = Callable[..., Tensor]

_REMEDY = "use the config.json and weights of one and the same checkpoint"


def plain_weights(
    tensors: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any],
    where: object,
    device: torch.device,
) -> dict[str, Readable]:
    """The tensors of a checkpoint, with every matrix of compressed-tensors dequantized.

    Args:
        tensors: the tensors as stored.
        quantization: the `quantization_config`.
        where: the checkpoint, for error messages.
        device: where matrices are computed.

    Returns:
        Key -> tensor. A dequantized matrix has the key of its `weight`.

    Raises:
        UnsupportedModel: a format cannot be read.
        CheckpointError: tensors do not match each other or the configuration.
    """
    scheme = read_scheme(quantization, f"{where}: quantization_config")
    modules: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in (*_PARTS, _PLAIN):
            modules.setdefault(module, {})[leaf] = tensor
    modules = {module: parts for module, parts in modules.items() if _is_quantized(parts)}
    plain: dict[str, Readable] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if module not in modules or leaf not in (*_PARTS, *_ACTIVATIONS, _PLAIN):
            plain[key] = tensor
        elif f"{module}.{_PLAIN}" not in plain:
            made = _matrix(f"{where}: {module}", modules[module], scheme, device)
            plain[f"{module}.{_PLAIN}"] = made
    return plain


def _is_quantized(parts: Mapping[str, StoredTensor]) -> bool:
    """Whether parts are more than an ordinary `weight`."""
    return parts.keys() != {_PLAIN} or not is_plain(parts[_PLAIN])


def _matrix(
    name: str, parts: Mapping[str, StoredTensor], scheme: Scheme, device: torch.device
) -> Readable:
    """The matrix of these parts."""
    if _ORDER in parts:
        raise UnsupportedModel(
            f"{name} has a {_ORDER}: its columns are not in their order; {REMEDY}"
        )
    if _WHOLE not in parts:
        return Matrix(name, parts, scheme, device)
    if not scheme.nvfp4:
        raise CheckpointError(
            f"{name} has a {_WHOLE}, but no group of config_groups is NVFP4; {_REMEDY}"
        )
    return nvfp4.Nvfp4Matrix(name, parts, nvfp4.COMPRESSED, device)


class Matrix(Dequantized):
    """A matrix that is computed from its stored parts when it is indexed."""

    def __init__(
        self, name: str, parts: Mapping[str, StoredTensor], scheme: Scheme, device: torch.device
    ) -> None:
        self._name, self._parts = name, parts
        self._check_parts(scheme)
        self._bits = scheme.bits if _PACKED in parts else None
        rows, columns = parts[_PLAIN if self._bits is None else _PACKED].get_shape()
        shape = rows, columns if self._bits is None else columns * (WORD // self._bits)
        super().__init__(name, parts, shape, parts[_SCALE].get_dtype(), device)
        self._grid, self._block = self._layout(parts[_SCALE].get_shape(), scheme)
        self._check_zeros()

    def _value(self, parts: Mapping[str, Tensor]) -> Tensor:
        shape = parts.get(_SHAPE)
        if shape is not None and shape.tolist() != list(self._shape):
            raise CheckpointError(
                f"{self._name}.{_SHAPE} is {shape.tolist()}, but {_PACKED} holds "
                f"{list(self._shape)}; download the checkpoint again, or quantize matrices whose "
                "rows fill whole words"
            )
        # On a CPU `dequantize` is the reference, which takes many times as long as this does.
        if self._device.type != "cpu" and self._kernel_reads(parts):
            return self._by_kernel(parts)
        # Codes and zero points are integers of at most 8 bits, which every dtype represents
        # exactly, so only the product is rounded.
        scales = parts[_SCALE].view(self._grid)
        codes = parts[_PLAIN] if self._bits is None else _ints(parts[_PACKED], self._bits)
        codes = codes.to(scales.dtype)
        if _ZERO in parts:
            zeros = parts[_ZERO]
            if self._bits is not None and zeros.dtype == torch.int32:
                zeros = _ints(zeros.T.contiguous(), self._bits)[:, : self._grid[0]].T
            codes = self._for_each(torch.sub, codes, zeros.reshape(self._grid).to(codes.dtype))
        return self._for_each(torch.mul, codes, scales)

    def _kernel_reads(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether `dequantize` makes the same of the parts: in bfloat16 alone."""
        high, wide = self._block
        symmetric = self._bits == 4 and _ZERO not in parts
        return symmetric and self.get_dtype() == "BF16" and high == 1 and wide % 8 == 0

    def _by_kernel(self, parts: Mapping[str, Tensor]) -> Tensor:
        values, scales = parts[_PACKED], parts[_SCALE].view(self._grid)
        return dequantize(Quantized(values[None], scales[None], "int4_group"))[0]

    def _for_each(self, operation: Operation, codes: Tensor, values: Tensor) -> Tensor:
        """Applies `operation`, in place, to every element and the value of its group or block."""
        (rows, columns), (tall, across), (high, wide) = self.get_shape(), self._grid, self._block
        if (rows, columns) != (tall * high, across * wide):  # the last blocks are partial
            values = values.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)
            return operation(codes, values[:, :columns], out=codes)
        parts = codes.view(tall, high, across, wide)
        operation(parts, values[:, None, :, None], out=parts)
        return codes

    def _check_parts(self, scheme: Scheme) -> None:
        """Checks that the parts belong to one format and have its dtypes."""
        if _SCALE not in self._parts or (_PACKED in self._parts) == (_PLAIN in self._parts):
            raise CheckpointError(
                f"{self._name} has {', '.join(sorted(self._parts))} as quantized parts; a matrix "
                f"needs a {_SCALE} and either {_PACKED} or an 8-bit {_PLAIN}: download the "
                "checkpoint again"
            )
        allowed = {_PACKED: ("I32",), _PLAIN: _CODES, _SCALE: tuple(_SCALES), _ZERO: ("I8", "I32")}
        for leaf, dtypes in allowed.items():
            part = self._parts.get(leaf)
            if part is not None and part.get_dtype() not in dtypes:
                raise UnsupportedModel(
                    f"{self._name}.{leaf} is {part.get_dtype()}; {' or '.join(dtypes)} can be read:"
                    " convert the tensor"
                )
            if leaf in (_PACKED, _PLAIN) and part is not None and len(part.get_shape()) != 2:
                raise UnsupportedModel(
                    f"{self._name}.{leaf} has shape {part.get_shape()}; matrices can be read, so "
                    "store each expert's apart"
                )
        if _PACKED in self._parts and scheme.bits is None:
            raise CheckpointError(
                f"{self._name} has a {_PACKED}, but no group of config_groups is packed; {_REMEDY}"
            )
        if (_ZERO in self._parts) not in scheme.zeros:
            has = "has a" if _ZERO in self._parts else "has no"
            raise CheckpointError(
                f"{self._name} {has} {_ZERO}, but config_groups say symmetric: "
                f"{_ZERO in self._parts}; {_REMEDY}"
            )

    def _check_zeros(self) -> None:
        """Checks that there is a zero point for every scale. In 32-bit words, they are packed along
        the rows.
        """
        zeros, scales = self._parts.get(_ZERO), self._parts[_SCALE].get_shape()
        if zeros is None:
            return
        dtype, shape, (tall, across) = zeros.get_dtype(), zeros.get_shape(), self._grid
        if dtype == "I32":
            fits = self._bits is not None and shape == [words_of(tall, self._bits), across]
        else:
            fits = shape == scales or math.prod(shape) == math.prod(scales) == 1
        if not fits:
            codes = "8-bit" if self._bits is None else "packed"
            raise CheckpointError(
                f"{self._name}.{_ZERO} is {dtype} {shape} beside {_SCALE} {scales} and {codes} "
                "codes; download the checkpoint again"
            )

    def _layout(self, scales: list[int], scheme: Scheme) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of the scales, and (rows, columns) of the elements that share one."""
        rows, columns = self.get_shape()
        tall, across = [*scales, 1, 1][:2] if len(scales) < 3 else (0, 0)
        block = scheme.block
        if block is not None and (tall, across) == (-(-rows // block[0]), -(-columns // block[1])):
            return (tall, across), block
        if (tall, across) == (1, 1) and scheme.single:
            return (1, 1), (rows, columns)
        wide = columns // max(1, across)
        known = wide in scheme.groups or (across == 1 and None in scheme.groups)
        if tall == rows and wide * across == columns and known:
            return (tall, across), (1, wide)
        sizes = sorted(size for size in scheme.groups if size)
        raise CheckpointError(
            f"{self._name}.{_SCALE} has shape {scales} for a matrix {[rows, columns]}; "
            f"config_groups have groups of {sizes or 'no'} columns"
            f"{', whole rows' if None in scheme.groups else ''} and blocks of {block}; {_REMEDY}"
        )


def _ints(words: Tensor, bits: int) -> Tensor:
    """Unpacks rows of words into int8: the lowest bits come first, and are stored with half
    their range added.
    """
    codes = words.view(torch.uint8)  # both safetensors and the machine are little-endian
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return codes.view(torch.int8) - (1 << (bits - 1))  # wraps for 8 bits: 0 becomes -128
