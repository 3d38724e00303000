"""rotary: rotary position embeddings of queries and keys, with the model's roundings."""

import torch
from torch import Tensor

from reap_kernels.dispatch import Backend, Request, Sizes, always, direct, register, select
from reap_kernels.errors import DtypeError, ShapeError, UsageError
from reap_kernels.norm.op import check_floats, check_numbers, check_weight
from reap_kernels.rotary import cpu, reference, triton_backend
from reap_kernels.rotary.call import Form
from reap_kernels.sort.op import cpu_only


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    separate: bool = False,
    per_pair: bool = False,
    float32: bool = False,
    start: int = 0,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Turns pairs (a, b) of each head's columns into (a cos - b sin, b cos + a sin), by angles of
    the token (Su et al., arXiv 2104.09864, equation 34), after an RMS norm of each head where
    weights are given; waits for nothing on a GPU.

    Where neither has a weight, results have the bits of the same operations in torch: both products
    and their sum are rounded to q's dtype, or with `float32` computed in float32 and rounded once.
    A norm before that is `rms_norm`'s, rounded to q's dtype: it is mostly the same bits, else off
    by 1 unit in the last place (2 with `round_first`), and the rotation by that of a and of b.

    Args:
        q: [B, heads, S, D] bf16, fp16 or fp32, any strides.
        k: [B, heads, S, D] likewise, with its own number of heads, or None.
        cos: [B or 1, S, R], any strides, a cosine for each of the R <= D columns that are rotated,
            or [B or 1, S, R / 2], one for each pair (`per_pair`). Of q's dtype, but with `float32`
            and for q in float32 of any of the three.
        sin: likewise, of the shape and dtype of `cos`.
        interleaved: whether columns 2 i and 2 i + 1 are a pair, as in GLM-4, Ernie and Cohere;
            else i and i + R / 2, as in Llama and Qwen3.
        separate: whether, of interleaved pairs, the results' first R / 2 columns are the first
            elements and the next R / 2 the second ones, as in DeepSeek-V3.
        per_pair: whether `cos` and `sin` have a column for each pair, as in gpt-oss. Tables of
            transformers for GLM-4, Ernie and DeepSeek-V3 have each pair's angle in both halves,
            which is the order of `interleaved=False`: for these give `cos[..., : R // 2]`, `sin`
            likewise, and `per_pair=True`.
        float32: whether products and sum are computed in float32 and rounded once.
        start: the first column that is rotated; those outside start .. start + R stay as they are,
            or as the norm makes them.
        q_weight: [D] weight of a norm of each head of q; default: no norm.
        k_weight: [D] likewise of k; only with `k`.
        eps, offset, round_first: of both norms, as in `rms_norm`; with `round_first` the weights
            must have q's dtype.
        backend: explicit backend, never falls back. Default: see `explain()`.

    Returns:
        q and k (None where k is), rotated, of their shapes and dtypes.

    Raises:
        ShapeError, DtypeError: inputs that do not fit each other; the message names the input.
        UsageError: an option or a number that cannot be used.
        BackendUnavailable: no backend serves, or the requested one refuses, with the reason.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> q, angles = torch.tensor([[[[3.0, 4.0]]]]), torch.full((1, 1, 2), torch.pi / 2)
        >>> turned, _ = rk.rotary(q, None, angles.cos(), angles.sin())
        >>> turned.round()
        tensor([[[[-4.,  3.]]]])
    """
    form = Form(interleaved, separate, per_pair, float32, start, eps, offset, round_first)
    _check(q, k, cos, sin, form)
    _check_weights(q, k, q_weight, k_weight, form)
    run = _run if direct(q) else torch.ops.reap_kernels.rotary
    turned_q, turned_k = run(q, k, cos, sin, q_weight, k_weight, *form, backend)
    return turned_q, None if k is None else turned_k


def _check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, form: Form) -> None:
    """Raises unless q and k are [B, heads, S, D] and cos and sin tables for them."""
    for name, x in (("q", q), ("k", k)):
        if x is not None and (x.ndim != 4 or x.shape[-1] == 0):
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}; expected [B, heads, S, D] with D >= 1"
            )
    check_floats(q=q, k=k, cos=cos, sin=sin)
    batch, _, tokens, width = q.shape
    if k is not None and (k.shape[0], k.shape[2], k.shape[3]) != (batch, tokens, width):
        raise ShapeError(
            f"k has shape {tuple(k.shape)}; it must equal q's {tuple(q.shape)} but for the heads"
        )
    if k is not None and k.dtype != q.dtype:
        raise DtypeError(f"k is {k.dtype}, q is {q.dtype}; convert one")
    if cos.ndim != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
        raise ShapeError(
            f"cos has shape {tuple(cos.shape)}; expected ({batch} or 1, {tokens}, columns)"
        )
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ShapeError(
            f"sin is {sin.dtype} {tuple(sin.shape)}; it must equal cos, "
            f"{cos.dtype} {tuple(cos.shape)}"
        )
    rotated = cos.shape[-1] * (2 if form.per_pair else 1)
    if rotated % 2 or not 0 < rotated <= width - form.start or form.start < 0:
        raise ShapeError(
            f"cos has {cos.shape[-1]} columns for {rotated} columns of q from start={form.start} "
            f"on, which has {width}; give an even number of 2 or more that are there"
        )
    if cos.dtype != q.dtype and not form.float32 and q.dtype != torch.float32:
        raise DtypeError(
            f"cos is {cos.dtype}, q is {q.dtype}; convert cos, or give float32=True for products "
            "in float32"
        )


def _check_weights(
    q: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, form: Form
) -> None:
    """Raises unless the norms, and what else the call asks for, can be computed."""
    check_numbers(form.eps, form.offset)
    if form.separate and not form.interleaved:
        raise UsageError(
            "separate=True is for interleaved pairs; give interleaved=True, or leave it out"
        )
    if k_weight is not None and k is None:
        raise UsageError("k_weight is given without k; give k, or leave it out")
    check_floats(q=q, q_weight=q_weight, k_weight=k_weight)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        check_weight(name, weight, q.shape[-1])
        if form.round_first and weight.dtype != q.dtype:
            raise DtypeError(
                f"{name} is {weight.dtype}, q is {q.dtype}; with round_first=True convert one"
            )


def _run(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    separate: bool,
    per_pair: bool,
    float32: bool,
    start: int,
    eps: float,
    offset: float,
    round_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    form = Form(interleaved, separate, per_pair, float32, start, eps, offset, round_first)
    batch, _, tokens, width = q.shape
    request = Request("rotary", q.device, q.dtype, sizes=Sizes(batch * tokens, 1, head=width))
    with torch.no_grad():
        run = select(request, backend).run
        turned_q, turned_k = run(q, k, cos, sin, q_weight, k_weight, form)
    return turned_q, q.new_empty(0) if turned_k is None else turned_k


@torch.library.custom_op("reap_kernels::rotary", mutates_args=())
def _rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    separate: bool,
    per_pair: bool,
    float32: bool,
    start: int,
    eps: float,
    offset: float,
    round_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return _run(
        q, k, cos, sin, q_weight, k_weight,
        interleaved, separate, per_pair, float32, start, eps, offset, round_first, backend,
    )  # fmt: skip


@_rotary.register_fake
def _(q: Tensor, k: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


register(Backend("rotary", "reference", lambda _: 0, lambda _: None, always(reference.rotary)))
register(Backend("rotary", "cpu", lambda _: 10, cpu_only, always(cpu.rotary)))
register(triton_backend.BACKEND)
