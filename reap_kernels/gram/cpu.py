"""CPU Gram matrices: piece by piece, in block rows that end at the diagonal.

Products are float32 (float64 for float64 rows) and add to the sums in the order of the pieces: the
same bits run to run.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from reap_kernels.experts.cpu import add_product, partition, summable
from reap_kernels.layer_gram import LayerGram
from reap_kernels.types import Routing

# Neurons of a block row. At 768 neurons 7 / 12 of the matrix are computed, in 0.6 of the time of
# all of it; with narrower blocks the products themselves get slower.
_BLOCK = 128


def gram(h: Tensor, routing: Routing, factors: Tensor, sums: LayerGram) -> None:
    """See `reap_kernels.gram.op.gram`; `factors` as `row_factors` returns them."""
    parts = partition(routing.offsets)
    add = adder(sums, routing, factors, parts)
    sizes = [rows for _, rows in parts]
    for piece in h[: sum(sizes)].split(sizes):
        add(piece.clone())


def adder(
    sums: LayerGram, routing: Routing, factors: Tensor, parts: list[tuple[int, int]]
) -> Callable[[Tensor], None]:
    """What adds the pieces of one call, given in order, [n, I] each; it overwrites them.

    Args:
        sums: added to in place; counts and weights at once.
        routing: the batch's sorted rows.
        factors: [T, k], from `row_factors`.
        parts: the pieces, from `partition`.
    """
    sizes = [rows for _, rows in parts]
    factor = factors.reshape(-1)[routing.gather_index[: sum(sizes)]]
    expert = torch.repeat_interleave(torch.arange(sums.num_experts), routing.offsets.diff())
    counted = factor != 0
    sums.count.add_(torch.bincount(expert[counted], minlength=sums.num_experts))
    sums.weight.add_(torch.bincount(expert, factor.square(), minlength=sums.num_experts))
    left = zip(parts, factor.split(sizes), counted.split(sizes), strict=True)
    whole = bool(counted.all())

    def add(h: Tensor) -> None:
        (own, _), factor, counted = next(left)
        if not whole:  # rows that do not count may hold anything
            h, factor = h[counted], factor[counted]
        _add_piece(sums.gram[own], sums.first[own], h, factor)

    return add


def _add_piece(gram: Tensor, first: Tensor, h: Tensor, factor: Tensor) -> None:
    """Adds rows of one expert, all of which count: h [n, I], factor [n]."""
    rows = summable(h)
    factor = factor.to(rows.dtype)
    rows.mul_(factor[:, None])
    first.add_(rows.T @ factor)
    width = rows.shape[1]
    number = -(-width // _BLOCK)
    cuts = (width * block // number for block in range(number + 1))
    for start, stop in itertools.pairwise(cuts):
        add_product(gram[start:stop, :stop], rows[:, start:stop].T, rows[:, :stop])
