"""Reference rotation of queries and keys, from the formulas, in float64."""

import torch
from torch import Tensor

from reap_kernels.norm.reference import normalized
from reap_kernels.rotary.call import Form, factors_of, pairs_of


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor | None]:
    """See `reap_kernels.rotary.op.rotary`; rounds the results, nothing between."""
    return _rotated(q, cos, sin, q_weight, form), (
        None if k is None else _rotated(k, cos, sin, k_weight, form)
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, form: Form) -> Tensor:
    y = x.double() if weight is None else normalized(x, weight, form.eps, form.offset)
    a, b = pairs_of(y, form, cos.shape[-1] * (2 if form.per_pair else 1))
    (cos_a, cos_b), (sin_a, sin_b) = (factors_of(t.double(), form) for t in (cos, sin))
    return written(x, y, (a * cos_a - b * sin_a, b * cos_b + a * sin_b), form)


def written(x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor], form: Form) -> Tensor:
    """A tensor like x, of rotated pairs where columns are rotated, and of y elsewhere."""
    out = torch.empty_like(x).copy_(y)
    placed = form._replace(interleaved=form.interleaved and not form.separate)
    for place, values in zip(pairs_of(out, placed, 2 * pairs[0].shape[-1]), pairs, strict=True):
        place.copy_(values)
    return out
