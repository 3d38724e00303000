"""Conjugate gradients for the changes of all down projections of a layer together.

Solved is, for every block of output rows with a ridge of its own,

    minimize over D  sum over tokens t of ||m_t - sum_j D_j phi_tj||^2 + ridge ||D||^2

with phi_tj = g_tj h_tj, what expert j contributes to token t before its down projection. No matrix
of (E I)^2 is needed: a step is one product of the layer with D in place of its down projections
(`observe_layer`) and one with the transpose (`reap_kernels.cross`). The Gram of each expert is the
preconditioner; it lacks only what experts have in common.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reap_driver.compensation.rows import ExpertRows, Rows
from reap_kernels import ExpertWeights, LayerGram, cross, observe_layer
from reap_kernels.errors import DataError

Total = Callable[[Sequence[Tensor]], None]

_WORK_BYTES = 1 << 29  # of float64 copies at a time; one expert at least


@dataclass(frozen=True)
class Problem:
    """The least squares of one layer.

    Attributes:
        experts: the layer's weights; its down projections are not read.
        rows: what the experts were given, and what their output lacks: `missing`, which a solution
            reduces in place.
        gram: of the rows that are fitted, by which steps are preconditioned.
        ridges: of each block.
        block: int64 [H], the block of each output row.
        total: adds tensors of all ranks in place.
        backend: of the products; None for the best one.
    """

    experts: ExpertWeights
    rows: Rows
    gram: LayerGram
    ridges: Sequence[float]
    block: Tensor
    total: Total
    backend: str | None = None

    def solve(self, steps: int, right: Tensor) -> Tensor:
        """Takes steps of conjugate gradients from 0.

        Args:
            steps: how many, 1 at least.
            right: float32 [E, H, I], the sum of g m h^T over the rows that are fitted; overwritten.

        Returns:
            D, float32 [E, H, I]. The rows' `missing` is what D leaves of it.
        """
        ridge = torch.tensor(self.ridges, dtype=torch.float64, device=right.device)[self.block]
        change = torch.zeros_like(right)
        direction, before = torch.zeros_like(right), torch.ones_like(ridge)
        factors = [self._factors(value) for value in self.ridges]
        for step in range(steps):
            if step:
                self.correlate(right)
                right.sub_(change * ridge.to(change.dtype)[None, :, None])
            nearer = self._preconditioned(right, factors)
            slope = self._by_block(_products(right, nearer))
            ratio = slope / before if step else torch.zeros_like(slope)
            before = torch.where(slope == 0, 1, slope)
            direction.mul_(ratio.to(direction.dtype)[None, :, None]).add_(nearer)
            del nearer
            # Rounded as the product reads it, so that the step is exact for what it computes.
            scale = direction.abs().amax().clamp(min=1e-30)
            used = (direction / scale).to(self.experts.dtype)
            curvature = self._by_block(self._apply(used) + ridge * _products(used, used))
            length = self._by_block(_products(right, used)) / curvature
            length = torch.where(curvature > 0, length, 0)
            change.add_(used.to(change.dtype) * length.to(change.dtype)[None, :, None])
            self._subtract(length)
        return change

    def correlate(self, out: Tensor) -> None:
        """Sets `out`, float32 [E, H, I], to the sum of g m h^T over the rows that are fitted."""
        out.zero_()
        for _, rows in fitted(self.rows):
            correlate(self.experts, rows, out, self.backend)
        self.total([out])

    def _apply(self, down: Tensor) -> Tensor:
        """Keeps the product of every row with `down`; sums its squares over those that are fitted:
        float64 [H].
        """
        experts = replace(self.experts, down=down, down_bias=None)
        squares = torch.zeros(down.shape[1], dtype=torch.float64, device=down.device)
        for number in range(len(self.rows)):
            rows = self.rows[number]
            product = observe_layer(
                rows.hidden, rows.ids, rows.weights, experts, backend=self.backend
            )
            self.rows[number] = replace(rows, product=product)
            if not rows.held_out:
                squares += rows.squares(product)
        self.total([squares])
        return squares

    def _subtract(self, length: Tensor) -> None:
        """Takes a step's products off what is missing."""
        for number in range(len(self.rows)):
            rows = self.rows[number]
            assert rows.product is not None
            step = rows.product.to(rows.missing.dtype) * length.to(rows.missing.dtype)
            self.rows[number] = replace(rows, missing=rows.missing - step, product=None)

    def _by_block(self, values: Tensor) -> Tensor:
        """Sums of values [H] over each block, [H]: every output row has that of its block."""
        sums = torch.zeros(len(self.ridges), dtype=values.dtype, device=values.device)
        return sums.index_add_(0, self.block, values)[self.block]

    def _preconditioned(self, right: Tensor, ridges: Sequence[Tensor]) -> Tensor:
        """(A_j + ridge)^-1 applied to each output row of each expert."""
        found = torch.empty_like(right)
        for number, factors in enumerate(ridges):
            own = (self.block == number).nonzero()[:, 0]
            for part in parts(self.gram):
                values = right[part][:, own].double()
                solved = torch.cholesky_solve(values.mT, factors[part]).mT
                found[part, own] = solved.to(found.dtype)
        return found

    def _factors(self, ridge: float) -> Tensor:
        """Lower Cholesky factors of all A_j + ridge."""
        found = []
        for part in parts(self.gram):
            lower = self.gram.gram[part].double().tril_()
            lower.diagonal(dim1=1, dim2=2).add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(lower)
            if bool(failed.any()):
                expert = part.start + int(failed.nonzero()[0])
                raise DataError(
                    f"the Gram of expert {expert} is not positive definite or not finite at a "
                    f"ridge of {ridge:.3g}; raise the ridge, or look for NaN in the data"
                )
            found.append(factor)
        return torch.cat(found)


def fitted(rows: Rows) -> Iterator[tuple[int, ExpertRows]]:
    """The batches that are fitted, by number."""
    for number in range(len(rows)):
        found = rows[number]
        if not found.held_out:
            yield number, found


def correlate(
    experts: ExpertWeights, rows: ExpertRows, out: Tensor, backend: str | None = None
) -> None:
    """Adds the sum over the rows of g m h^T to `out`, float32 [E, H, I]."""
    cross(
        rows.hidden,
        rows.ids,
        rows.weights,
        experts,
        rows.missing.to(rows.hidden.dtype),
        out,
        mask=rows.mask,
        backend=backend,
    )


def parts(gram: LayerGram) -> Iterator[slice]:
    """Runs of experts that are worked on together in float64."""
    each = 8 * gram.intermediate_size * 6 * gram.intermediate_size
    size = max(1, _WORK_BYTES // each)
    return (slice(start, start + size) for start in range(0, gram.num_experts, size))


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Sums of left x right over experts and neurons, float64 [H]."""
    found = torch.zeros(left.shape[1], dtype=torch.float64, device=left.device)
    for one, other in zip(left, right, strict=True):  # expert by expert: float64 copies are large
        found += (one.double() * other.double()).sum(dim=1)
    return found
