"""CPU rotation of queries and keys: products and sums of pairs, rounded as models round them."""

from torch import Tensor

from reap_kernels.norm.cpu import normalized
from reap_kernels.rotary.call import Form, factors_of, pairs_of
from reap_kernels.rotary.reference import written


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor | None]:
    """See `reap_kernels.rotary.op.rotary`."""
    return _rotated(q, cos, sin, q_weight, form), (
        None if k is None else _rotated(k, cos, sin, k_weight, form)
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, form: Form) -> Tensor:
    y = x
    if weight is not None:
        y = normalized(x, weight, form.eps, form.offset, form.round_first)
    a, b = pairs_of(y, form, cos.shape[-1] * (2 if form.per_pair else 1))
    (cos_a, cos_b), (sin_a, sin_b) = (factors_of(table, form) for table in (cos, sin))
    if form.float32:
        a, b = a.float(), b.float()
    return written(x, y, (a * cos_a - b * sin_a, b * cos_b + a * sin_b), form)
