"""What a call of `rotary` computes, beside its tensors."""

from typing import NamedTuple

from torch import Tensor


class Form(NamedTuple):
    """The form of a rotation and of the norm before it; see `reap_kernels.rotary.op.rotary`."""

    interleaved: bool
    separate: bool
    per_pair: bool
    float32: bool
    start: int
    eps: float
    offset: float
    round_first: bool


def pairs_of(x: Tensor, form: Form, rotated: int) -> tuple[Tensor, Tensor]:
    """Views of the first and the second elements of the pairs of x, [..., R / 2] each."""
    columns = x[..., form.start : form.start + rotated]
    if form.interleaved:
        return columns[..., 0::2], columns[..., 1::2]
    return columns[..., : rotated // 2], columns[..., rotated // 2 :]


def factors_of(table: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Views [B or 1, 1, S, R / 2] of cosines or sines, of the pairs' first and second elements."""
    table = table.unsqueeze(1)
    if form.per_pair:
        return table, table
    return pairs_of(table, form._replace(start=0), table.shape[-1])
