"""CUDA dequantization: launches of `csrc/dequant.cu`."""

import torch
from torch import Tensor

from reap_kernels import cuda
from reap_kernels.errors import ShapeError
from reap_kernels.quantized import FORMATS, Quantized

_LAUNCHERS = {
    "fp8_block": "dequantize_fp8",
    "mxfp4": "dequantize_mxfp4",
    "int4_group": "dequantize_int4",
}
_KERNELS = {
    name: cuda.Kernel(
        _LAUNCHERS[name],
        values=stored,
        scales=scaled if len(scaled) > 1 else scaled[0],
        offsets=torch.int64,
        out=torch.bfloat16,
    )
    for name, (_, stored, scaled) in FORMATS.items()
}
# Bytes of values that a thread loads at once: those of 8 elements.
_LOADS = {"fp8_block": 8, "mxfp4": 4, "int4_group": 4}


def dequantize(matrices: Quantized, offsets: Tensor | None, out: Tensor) -> None:
    """See `reap_kernels.dequant.op.dequantize`; experts without rows are not written.

    Raises:
        ShapeError: `out`, or the codes, begin at an address the kernel cannot store to or load
            from at once.
    """
    experts, rows, columns = matrices.shape
    high, wide = matrices.scale_block
    if columns % 8 == 0:  # else the kernel takes one element at a time
        values = matrices.values
        for name, tensor, width in (("out", out, 16), ("values", values, _LOADS[matrices.format])):
            if tensor.data_ptr() % width:
                raise ShapeError(
                    f"dequantize: {name} begins {tensor.data_ptr() % width} bytes past a multiple "
                    f"of {width}, at storage offset {tensor.storage_offset()}; pass {name}.clone()"
                )
    _KERNELS[matrices.format](
        matrices.device,
        f"E = {experts}, N = {rows}, K = {columns}, {matrices.format}",
        values=matrices.values,
        scales=matrices.scales,
        **({"scales_dtype": 0} if matrices.format == "mxfp4" else {}),
        offsets=offsets,
        out=out,
        experts=experts,
        rows=rows,
        columns=columns,
        block_rows=high,
        block_columns=wide,
    )
