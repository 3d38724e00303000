"""What happens to one tensor of the source: the vocabulary between deciding (keys.py) and writing
(stream.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Copy:
    """The same bytes, under the same or (a renumbered expert) another name."""

    name: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Not written. `reason` is "expert" (removed by the plan) or "mtp" (a multi-token-prediction
    layer).
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Select:
    """Rows of dimension `dim` are kept, in ascending order.

    `rows` holds one tuple per equal part of dimension 0; more than one only where a tensor
    stacks several layers there, each with its own experts.
    """

    name: str
    dim: int
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class SelectCodes:
    """Codes of `bits` bits, packed along `dim` into 32-bit words, first code lowest: those at these
    positions are kept, in this order, and packed again; bits behind the last are zero.

    A code may lie in two words, as with 3 bits.
    """

    name: str
    dim: int
    bits: int
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetLength:
    """The values are the shape of a matrix that is cut: the one at `index` is `before` in the
    source and becomes `after`.
    """

    name: str
    index: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Relabel:
    """The values are expert ids, one row per token: removed ids become kept ones, kept ids their
    new number.
    """

    name: str
    kept: tuple[int, ...]
    num_experts: int


Action = Copy | Drop | Select | SelectCodes | SetLength | Relabel
