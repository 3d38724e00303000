"""Triton RMS norm: the launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reap_kernels import device
from reap_kernels.norm import kernel_triton as kernels
from reap_kernels.norm.reference import result_dtype

# Results are those of torch's single operations, which fuse no product with a sum.
OPTIONS = {"enable_fp_fusion": False}
# Elements of a program: of 8 KiB in bf16, a GPU holds enough to keep its memory busy.
_TILE = 4096
# Elements of a thread: more registers would leave fewer programs resident.
_THREAD = 32
_MOST_ROWS = 64


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def rows_of_tile(width: int, most: int) -> int:
    """Rows, a power of two up to `most`, that a program holds of `width` columns, another one."""
    return max(1, min(most, _TILE // width))


def warps_of_tile(elements: int) -> int:
    """Warps of a program that holds so many elements."""
    return max(1, min(16, elements // (32 * _THREAD)))


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `reap_kernels.norm.op.rms_norm`."""
    out = torch.empty_like(x, dtype=result_dtype(x, weight, round_first))
    total = None if residual is None else torch.empty_like(x)
    if x.numel():
        with device.on(x.device):
            _launch(x, weight, residual, out, total, (eps, offset), round_first)
    return out, total


def _launch(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    numbers: tuple[float, float],
    round_first: bool,
) -> None:
    """Launches one kernel, or one for each element of leading dimensions that are too many."""
    merged = _merged([x, x if residual is None else residual, out])
    if merged is None:
        for n in range(len(x)):
            added, sums = (None if y is None else y[n] for y in (residual, total))
            _launch(x[n], weight, added, out[n], sums, numbers, round_first)
        return
    (n0, n1, n2), strides = merged
    block = power_of_two(x.shape[-1])
    rows = rows_of_tile(block, _MOST_ROWS)
    kernels.rms_norm_rows[(-(-n0 * n1 * n2 // rows),)](
        x,
        x if residual is None else residual,  # a stand-in is never read
        x if weight is None else weight,
        out,
        out if total is None else total,
        n0 * n1 * n2,
        n1,
        n2,
        x.shape[-1],
        *strides,
        0 if weight is None else weight.stride(0),
        *numbers,
        WEIGHTED=weight is not None,
        ADDED=residual is not None,
        ROUND_FIRST=round_first,
        ROWS=rows,
        BLOCK=block,
        EMULATED=device.interpreted(),
        num_warps=warps_of_tile(rows * block),
        **OPTIONS,
    )


def _merged(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]] | None:
    """Sizes of three leading dimensions, and each tensor's strides of them and of its columns; None
    where more dimensions are left after those that have one distance in every tensor were merged.
    """
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for at, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        here = [tensor.stride(at) for tensor in tensors]
        if sizes and all(s[-1] == size * step for s, step in zip(strides, here, strict=True)):
            sizes[-1] *= size
        else:
            sizes.append(size)
            for s in strides:
                s.append(0)
        for s, step in zip(strides, here, strict=True):
            s[-1] = step
    absent = 3 - len(sizes)
    if absent < 0:
        return None
    flat = [
        step
        for tensor, s in zip(tensors, strides, strict=True)
        for step in (*[0] * absent, *s, tensor.stride(-1))
    ]
    return [1] * absent + sizes, flat
