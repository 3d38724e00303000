"""Dequantizes NVFP4: 4-bit floats (E2M1) in groups of 16, an 8-bit scale per group, one for all.

Both quantizers store two codes per byte, the first in the low bits, and scales in float8_e4m3fn.
An element is code x scale of its group, in float32:

compressed-tensors  `weight_packed`; the scale is `weight_scale` / `weight_global_scale`; the value
                    is rounded to bfloat16, whatever the dtype of the model
ModelOpt            `weight`; the scale is `weight_scale` x `weight_scale_2`; loading rounds the
                    value to the dtype of the run
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reap_driver.files.settings_checks import refuse
from reap_driver.load.code_tables import values_of_bytes
from reap_driver.load.tensor_reader import DTYPES, Dequantized, Readable, StoredTensor
from reap_kernels.errors import CheckpointError

GROUP = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))  # the highest bit is the sign
# `quant_algo` of ModelOpt whose weights are only these; others change the inputs of layers too.
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
_SMOOTHED = "pre_quant_scale"
_INPUTS = frozenset({"input_scale", "output_scale"})


@dataclass(frozen=True)
class Names:
    """How a quantizer names and uses the parts of a matrix.

    Attributes:
        codes, scale, whole: last parts of the names of codes, scales per group, and the one scale.
        divided: whether scales are divided by the one scale; else they are multiplied by it.
        dtype: that of the values, as safetensors names it.
    """

    codes: str
    scale: str
    whole: str
    divided: bool
    dtype: str

    @property
    def parts(self) -> tuple[str, str, str]:
        """The last parts of the names of all."""
        return self.codes, self.scale, self.whole


COMPRESSED = Names("weight_packed", "weight_scale", "weight_global_scale", True, "BF16")
MODELOPT = Names("weight", "weight_scale", "weight_scale_2", False, "F32")


class Nvfp4Matrix(Dequantized):
    """A matrix of 4-bit floats that is computed from its stored parts when it is indexed.

    Args:
        name: checkpoint and module, for error messages.
        parts: its tensors as stored, by the last part of their names.
        names: those of the quantizer.
        device: where it is computed.

    Raises:
        CheckpointError: the parts do not belong together.
    """

    def __init__(
        self, name: str, parts: Mapping[str, StoredTensor], names: Names, device: torch.device
    ) -> None:
        self._names = names
        _check(name, parts, names)
        rows, half = parts[names.codes].get_shape()
        super().__init__(name, parts, (rows, 2 * half), names.dtype, device)

    def _value(self, parts: Mapping[str, Tensor]) -> Tensor:
        names = self._names
        scales, whole = parts[names.scale].float(), parts[names.whole]
        scales = scales / whole if names.divided else scales * whole
        values = values_of_bytes(parts[names.codes], _E2M1, low_first=True)
        values = values.view(*scales.shape, GROUP).mul_(scales[..., None])
        return values.view(self.get_shape()).to(DTYPES[self.get_dtype()])


def modelopt_weights(
    tensors: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any],
    where: object,
    device: torch.device,
) -> dict[str, Readable]:
    """The tensors of a checkpoint, with every matrix that ModelOpt stored as NVFP4 dequantized.

    The arguments are those of `load.methods.plain_weights`, with the settings as a mapping. Layers
    of `exclude_modules` are stored as ordinary floats, and so are known by their tensors.

    Raises:
        UnsupportedModel: `quant_algo` is another one.
        CheckpointError: the parts of a matrix do not belong together.
    """
    algorithm = quantization.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        refuse(
            f"{where}: quant_algo of ModelOpt's settings is {algorithm!r}", " or ".join(_ALGORITHMS)
        )
    modules: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if f"{module}.{MODELOPT.whole}" in tensors and leaf in MODELOPT.parts:
            modules.setdefault(module, {})[leaf] = tensor
    plain: dict[str, Readable] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        parts = modules.get(module, {})
        if leaf == _SMOOTHED:
            refuse(f"{where}: {key} multiplies the inputs of a layer", "layers without it")
        if not parts or leaf not in (*MODELOPT.parts, *_INPUTS):
            plain[key] = tensor
        elif leaf in parts and f"{module}.{MODELOPT.codes}" not in plain:
            made = Nvfp4Matrix(f"{where}: {module}", parts, MODELOPT, device)
            plain[f"{module}.{MODELOPT.codes}"] = made
    return plain


def _check(name: str, parts: Mapping[str, StoredTensor], names: Names) -> None:
    """Raises CheckpointError for parts that are missing or too many, or have other dtypes or
    shapes.
    """
    other = sorted(parts.keys() - {*names.parts})
    if other:
        raise CheckpointError(
            f"{name} has {', '.join(other)}, which NVFP4 does not use; use the config.json and "
            "weights of one and the same checkpoint"
        )
    lost = sorted({*names.parts} - parts.keys())
    if lost:
        raise CheckpointError(
            f"{name} is stored as NVFP4 without {', '.join(lost)}; download the checkpoint again"
        )
    dtypes = {names.codes: "U8", names.scale: "F8_E4M3", names.whole: "F32"}
    for leaf, dtype in dtypes.items():
        if parts[leaf].get_dtype() != dtype:
            raise CheckpointError(
                f"{name}.{leaf} is {parts[leaf].get_dtype()}; NVFP4 has {dtype}: download the "
                "checkpoint again"
            )
    codes, scales, whole = (parts[leaf].get_shape() for leaf in dtypes)
    if len(codes) != 2 or scales != [codes[0], 2 * codes[1] // GROUP] or 2 * codes[1] % GROUP:
        raise CheckpointError(
            f"{name}.{names.codes} has shape {codes} and {names.scale} {scales}; NVFP4 has a scale "
            f"for {GROUP} codes of a row, two of them in a byte: download the checkpoint again"
        )
    if whole not in ([], [1]):
        raise CheckpointError(
            f"{name}.{names.whole} has shape {whole}, and a matrix has one: download the "
            "checkpoint again"
        )
