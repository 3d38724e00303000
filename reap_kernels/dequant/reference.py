"""Reference dequantization: the definition in `quantized`, expert by expert; on any device."""

from torch import Tensor

from reap_kernels.quantized import Quantized


def dequantize(matrices: Quantized, offsets: Tensor | None, out: Tensor) -> None:
    """See `reap_kernels.dequant.op.dequantize`; writes every expert, whatever `offsets`: to ask
    which have rows would wait for the device.
    """
    for expert, matrix in enumerate(matrices):
        out[expert] = matrix
