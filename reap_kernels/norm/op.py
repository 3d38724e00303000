"""rms_norm: the root-mean-square norm of a model's rows, with the model's roundings."""

import math
from typing import overload

import torch
from torch import Tensor

from reap_kernels.dispatch import Backend, Request, Sizes, always, direct, register, select
from reap_kernels.errors import DtypeError, ShapeError, UsageError
from reap_kernels.norm import cpu, reference, triton_backend
from reap_kernels.sort.op import cpu_only

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = ...,
    round_first: bool = ...,
    residual: None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = ...,
    round_first: bool = ...,
    residual: Tensor,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    round_first: bool = False,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension (Zhang and Sennrich,
    arXiv 1910.07467, equation 4), or that of `residual` + x; waits for nothing on a GPU.

    The norm is computed in float32. It is rounded where models round it: once, at the end, or first
    to x's dtype and then in the product with the weight (`round_first`, as in Llama, Qwen3 and
    DeepSeek-V3). `offset=1` gives the norm of Gemma and Qwen3-Next, whose weights are differences
    from 1. Norms that subtract a mean or have a gate are not computed.

    Beside the same operations in torch, only the mean is summed in another order. So results in
    bf16 and fp16 are mostly the same bits, and the others differ by 1 unit in the last place, by up
    to 2 with `round_first`; those in float32 differ by at most 1e-6 of their size. The sum with
    `residual` has the same bits. On CPUs, so has the norm. A row's result depends on nothing but
    the row, and is the same from run to run.

    Args:
        x: [..., H] bf16, fp16 or fp32, any strides; where more than three leading dimensions do
            not merge into rows of equal distance, `triton` launches a kernel for each element of
            the first of them.
        weight: [H] of any of these dtypes, or None for a norm without a weight.
        eps: what is added to the mean of squares, at least 0.
        offset: what is added to the weight: in float32, with `round_first` in the weight's dtype.
        round_first: whether the norm is rounded to x's dtype before it is multiplied by the weight.
        residual: [..., H], shape and dtype of x. Default: none.
        backend: explicit backend, never falls back. Default: see `explain()`.

    Returns:
        The norm, [..., H] of x's dtype, with `round_first` of the dtype that x's and the weight's
        promote to. With `residual`, the pair of the norm and the sum that it is of, residual + x
        rounded to x's dtype.

    Raises:
        ShapeError, DtypeError: inputs that do not fit each other; the message names the input.
        UsageError: `eps` or `offset` is not a number that can be used.
        BackendUnavailable: no backend serves, or the requested one refuses, with the reason.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> rk.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
        tensor([[0.8485, 2.2627]])
        >>> normed, total = rk.rms_norm(torch.ones(2, 8), None, 1e-6, residual=torch.ones(2, 8))
        >>> float(total[0, 0]), round(float(normed[0, 0]), 4)
        (2.0, 1.0)
    """
    _check(x, weight, residual)
    check_numbers(eps, offset)
    run = _run if direct(x) else torch.ops.reap_kernels.rms_norm
    out, total = run(x, weight, residual, eps, offset, round_first, backend)
    return out if residual is None else (out, total)


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None) -> None:
    """Raises unless x is [..., H], `weight` [H] and `residual` like x, floats on one device."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ShapeError(f"x has shape {tuple(x.shape)}; expected [..., H] with H >= 1")
    check_floats(x=x, weight=weight, residual=residual)
    if weight is not None:
        check_weight("weight", weight, x.shape[-1])
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ShapeError(
            f"residual has shape {tuple(residual.shape)}; it must equal x's {tuple(x.shape)}"
        )
    if residual.dtype != x.dtype:
        raise DtypeError(f"residual is {residual.dtype}, x is {x.dtype}; convert one")


def check_floats(**inputs: Tensor | None) -> None:
    """Raises unless inputs are bf16, fp16 or fp32, and on the device of the first."""
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    first, where = next((name, tensor.device) for name, tensor in given.items())
    for name, tensor in given.items():
        if tensor.dtype not in FLOATS:
            raise DtypeError(f"{name} is {tensor.dtype}; expected bf16, fp16 or fp32")
        if tensor.device != where:
            raise DtypeError(f"{first} is on {where}, {name} on {tensor.device}; move one")


def check_weight(name: str, weight: Tensor, width: int) -> None:
    """Raises unless a norm's weight has one element for each of `width` columns."""
    if tuple(weight.shape) != (width,):
        raise ShapeError(f"{name} has shape {tuple(weight.shape)}; expected ({width},)")


def check_numbers(eps: float, offset: float) -> None:
    """Raises unless both are finite, and eps is at least 0."""
    # Compared rather than asked whether they are finite, which torch.compile does not trace.
    if not 0 <= eps < math.inf:
        raise UsageError(f"eps is {eps}; give a number of at least 0, such as 1e-6")
    if not -math.inf < offset < math.inf:
        raise UsageError(f"offset is {offset}; give 0, or 1 where weights are differences from 1")


def _run(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    sizes = Sizes(x.numel() // width, 1, hidden=width)
    request = Request("norm", x.device, x.dtype, sizes=sizes)
    with torch.no_grad():
        out, total = select(request, backend).run(x, weight, residual, eps, offset, round_first)
    return out, x.new_empty(0) if total is None else total


@torch.library.custom_op("reap_kernels::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return _run(x, weight, residual, eps, offset, round_first, backend)


@_rms_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, dtype=reference.result_dtype(x, weight, round_first))
    return out, x.new_empty(0) if residual is None else torch.empty_like(x)


register(Backend("norm", "reference", lambda _: 0, lambda _: None, always(reference.rms_norm)))
register(Backend("norm", "cpu", lambda _: 10, cpu_only, always(cpu.rms_norm)))
register(triton_backend.BACKEND)
