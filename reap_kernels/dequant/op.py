"""dequantize: experts' matrices in bf16, from the format they are stored in."""

from collections.abc import Callable

import torch
from torch import Tensor

from reap_kernels import env
from reap_kernels.dequant import cuda_backend, reference
from reap_kernels.dispatch import (
    Backend,
    Request,
    Sizes,
    always,
    automatic,
    backends,
    register,
    select,
)
from reap_kernels.errors import DtypeError, ShapeError
from reap_kernels.quantized import Quantized


def dequantize(
    matrices: Quantized,
    *,
    offsets: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Makes the bf16 matrices of quantized experts; waits for nothing.

    Args:
        matrices: E matrices [N, K] in one of the formats of `Quantized`.
        offsets: [E + 1] int64 from `sort_by_expert`. The parts of `out` of experts without rows,
            `offsets[e] == offsets[e + 1]`, need not be written: what they hold has no meaning.
            Default: every expert is written.
        out: [E, N, K] bf16, contiguous, on the same device; default a new tensor.
        backend: explicit backend, never falls back. Default: see `explain()`.

    Returns:
        `out`. Every backend gives the same bits (NaN aside, of which there are many).

    Raises:
        ShapeError, DtypeError: `offsets` or `out` do not fit `matrices`.
        BackendUnavailable: no backend serves, or the requested one refuses.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> values = torch.ones(2, 8, 16).to(torch.float8_e4m3fn)
        >>> matrices = rk.Quantized(values, torch.full((2, 1, 1), 0.5), "fp8_block")
        >>> rk.dequantize(matrices).dtype
        torch.bfloat16
    """
    request = _request(matrices)
    out = _checked(matrices, offsets, out)
    with torch.no_grad():
        select(request, backend).run(matrices, offsets, out)
    return out


def chosen(matrices: Quantized) -> Callable[[Quantized, Tensor | None, Tensor], None]:
    """What writes parts of `matrices`, (part, offsets, out), as a step of another op: the backend
    that `REAP_BACKEND` asks for where this op has it, else automatic choice.
    """
    request = _request(matrices)
    known = env.backend("dequant") in backends("dequant")
    return (select(request) if known else automatic(request)).run


def _request(matrices: Quantized) -> Request:
    experts, rows, columns = matrices.shape
    return Request(
        "dequant",
        matrices.device,
        matrices.dtype,
        sizes=Sizes(experts=experts, hidden=columns, intermediate=rows),
        layout="quantized",
    )


def _checked(matrices: Quantized, offsets: Tensor | None, out: Tensor | None) -> Tensor:
    """`out`, or a new one; raises where it or `offsets` do not fit."""
    experts = len(matrices)
    if offsets is not None:
        if tuple(offsets.shape) != (experts + 1,):
            raise ShapeError(
                f"offsets has shape {tuple(offsets.shape)}; {experts} experts need ({experts + 1},)"
            )
        if offsets.dtype != torch.int64 or offsets.device != matrices.device:
            raise DtypeError(
                f"offsets is {offsets.dtype} on {offsets.device}; expected int64 on "
                f"{matrices.device}"
            )
    if out is None:
        return torch.empty(matrices.shape, dtype=matrices.dtype, device=matrices.device)
    if tuple(out.shape) != matrices.shape or not out.is_contiguous():
        raise ShapeError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}; expected a contiguous "
            f"{matrices.shape}"
        )
    if out.dtype != matrices.dtype or out.device != matrices.device:
        raise DtypeError(
            f"out is {out.dtype} on {out.device}; expected {matrices.dtype} on {matrices.device}"
        )
    return out


register(Backend("dequant", "reference", lambda _: 0, lambda _: None, always(reference.dequantize)))
register(cuda_backend.BACKEND)
