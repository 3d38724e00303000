"""Reference dequantisation: the definition in `quantised`, expert by expert; on any device."""

from torch import Tensor

from reap_kernels.quantised import Quantised


def dequantise(matrices: Quantised, offsets: Tensor | None, out: Tensor) -> None:
    """See `reap_kernels.dequant.op.dequantise`; writes every expert, whatever `offsets`: to ask
    which have rows would wait for the device.
    """
    for expert, matrix in enumerate(matrices):
        out[expert] = matrix
