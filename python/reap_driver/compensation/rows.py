"""What the experts of a layer were given, and what their output lacks."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertRows:
    """One batch of T tokens at the experts of a layer.

    Attributes:
        hidden: [T, H], the experts' input.
        ids: int [T, k], the experts that each token is routed to.
        weights: [T, k], their router weights.
        missing: float32 [T, H], what is to be added to the sum of the experts' outputs.
        mask: bool [T], the tokens that count; None for all.
        held_out: whether the batch is not fitted but judges the fit.
        product: [T, H], of the experts with a direction in place of their down projections, while a
            solver needs it.

    Example:
        >>> ids = torch.tensor([[0, 1]] * 5)
        >>> weights, hidden = torch.full((5, 2), 0.5), torch.randn(5, 64)
        >>> rows = rd.ExpertRows(hidden, ids, weights, missing=torch.randn(5, 64))
        >>> rows.tokens
        5
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    missing: Tensor
    mask: Tensor | None = None
    held_out: bool = False
    product: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return len(self.hidden) if self.mask is None else int(self.mask.sum())

    def squares(self, values: Tensor) -> Tensor:
        """Sums of the squares of values [T, H] over the tokens that count: float64 [H]."""
        counted = values if self.mask is None else torch.where(self.mask[:, None], values, 0)
        return counted.double().square().sum(dim=0)


class Rows(Protocol):
    """Batches by number, in memory or not; a list is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> ExpertRows: ...

    def __setitem__(self, number: int, rows: ExpertRows, /) -> None: ...
