"""Which quantization methods can be observed, and the function that reads each of them.

Everything that reads weights, or checks before whether they can be read, asks this one table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reap_driver.compat.pretrained import DEQUANTIZED_ON_LOAD
from reap_driver.files.quantization import REMEDY, Quantization
from reap_driver.load import bitsandbytes, compressed_matrices, nvfp4, packed_matrices, torchao
from reap_driver.load.tensor_reader import Readable, StoredTensor, is_plain
from reap_kernels.errors import UnsupportedModel
from reap_kernels.schema import short

# Makes the tensors of a checkpoint, dequantized. Arguments: the tensors as stored by key, the
# quantizer's settings, the checkpoint's name for error messages, and where matrices are computed.
Reader = Callable[
    [Mapping[str, StoredTensor], Mapping[str, Any], object, torch.device], dict[str, Readable]
]


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        name: as its users know it.
        reader: makes its weights; None if transformers does (`DEQUANTIZED_ON_LOAD`), or nothing.
    """

    name: str
    reader: Reader | None = None


# By `quant_method`, in lower case.
METHODS = {
    "auto-round": Method("AutoRound", packed_matrices.auto_round),
    "awq": Method("AWQ", packed_matrices.awq),
    "bitsandbytes": Method("bitsandbytes", bitsandbytes.plain_weights),
    "compressed-tensors": Method("compressed-tensors", compressed_matrices.plain_weights),
    "eetq": Method("EETQ"),
    "fp8": Method("FP8"),
    "gptq": Method("GPTQ", packed_matrices.gptq),
    "hqq": Method("HQQ"),
    "modelopt": Method("ModelOpt", nvfp4.modelopt_weights),
    "mxfp4": Method("MXFP4"),
    "quanto": Method("quanto"),
    "torchao": Method("torchao", torchao.plain_weights),
}
# Other names of the same methods.
_ALIASES = {"intel/auto-round": "auto-round"}


def method_by(name: str) -> Method:
    """The method of this `quant_method`; one without a reader if it is not known."""
    known = METHODS.get(_ALIASES.get(name, name))
    return Method(f"the method {short(name)}") if known is None else known


def plain_weights(
    tensors: Mapping[str, StoredTensor],
    quantization: Quantization,
    where: object,
    device: torch.device,
) -> dict[str, Readable]:
    """The tensors of a checkpoint, with every matrix dequantized that transformers does not
    dequantize itself.

    Args:
        tensors: the tensors as stored; may be empty, to check the settings alone.
        quantization: the checkpoint's quantizer.
        where: the checkpoint, for error messages.
        device: where matrices are computed.

    Returns:
        Key -> tensor. A dequantized matrix has the key of its `weight`.

    Raises:
        UnsupportedModel: the method, or a format of it, cannot be read.
        CheckpointError: tensors do not match each other or the settings.
    """
    name = quantization.method
    if name in DEQUANTIZED_ON_LOAD or not (name or quantization.settings):
        return dict(tensors)
    if tensors and not quantization.is_stated and all(map(is_plain, tensors.values())):
        return dict(tensors)
    method = method_by(name or "unnamed")
    if method.reader is None:
        raise UnsupportedModel(
            f"{where}: by {quantization.origin} its weights are stored by {method.name}, which is "
            f"not read; {REMEDY}"
        )
    return method.reader(tensors, quantization.settings, where, device)
