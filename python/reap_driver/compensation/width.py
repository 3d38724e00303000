"""Narrower experts: which neurons stay, and the down projections that make up for the others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.compensation.elimination import eliminate
from reap_driver.compensation.inputs import Layer
from reap_kernels import LayerGram
from reap_kernels.errors import DataError, ShapeError

RIDGE = 1e-3
_WORK_BYTES = 1 << 29  # of float64 copies at a time; one expert at least


@dataclass(frozen=True)
class WidthOrder:
    """In which order the neurons of each expert can go, and what that costs.

    Orders are nested: the neurons kept at one width are among those kept at any larger one.

    Attributes:
        removed: int64 [E, I - least], neurons of each expert, the first to go first.
        costs: float64 [E, I - least], what each step adds to the squared error.
        energy: float64 [E], sum over rows of g^2 ||W h||^2.
        shift: float64 [E], what was added to the diagonal of each Gram.
        width: I.
        notes: sentences on experts with few rows or none, for plans and reports.
    """

    removed: Tensor
    costs: Tensor
    energy: Tensor
    shift: Tensor
    width: int
    notes: tuple[str, ...]

    def kept(self, keep: int) -> Tensor:
        """The neurons of each expert at width `keep`: int64 [E, keep], ascending."""
        alive = self._alive(keep)
        return alive.nonzero()[:, 1].view(len(alive), keep)

    def gone(self, keep: int) -> Tensor:
        """The neurons that each expert loses at width `keep`: int64 [E, I - keep], ascending."""
        alive = self._alive(keep)
        return (~alive).nonzero()[:, 1].view(len(alive), self.width - keep)

    def of(self, experts: Sequence[int]) -> "WidthOrder":
        """The order of some of its experts alone, by their positions in it."""
        chosen = torch.tensor(list(experts), device=self.removed.device)
        return WidthOrder(
            self.removed[chosen],
            self.costs[chosen],
            self.energy[chosen],
            self.shift[chosen],
            self.width,
            self.notes,
        )

    def error(self, keep: int) -> Tensor:
        """Expected squared error of each expert at width `keep`, relative to its energy: float64
        [E], 0 for an expert without rows. It includes what the ridge costs.
        """
        self._check(keep)
        return _relative(self.costs[:, : self.width - keep].sum(1), self.energy)

    def _alive(self, keep: int) -> Tensor:
        """bool [E, I]."""
        self._check(keep)
        gone = self.removed[:, : self.width - keep]
        alive = torch.ones(len(gone), self.width, dtype=torch.bool, device=gone.device)
        return alive.scatter_(1, gone, False)

    def _check(self, keep: int) -> None:
        least = self.width - self.removed.shape[1]
        if not least <= keep <= self.width:
            raise ShapeError(
                f"width {keep} is not in the order of these neurons, which holds widths from "
                f"{least} to {self.width}; make it with `least={keep}`"
            )


@dataclass(frozen=True)
class WidthCut:
    """Experts cut to I' neurons.

    Attributes:
        neurons: int64 [E, I'], the neurons that stay, ascending: the rows of up and gate to keep.
        down: [E, H, I'], the down projections for them, in the dtype given.
        error: float64 [E], sum over rows of g^2 ||W h - W' h_kept||^2 relative to that of
            g^2 ||W h||^2; 0 for an expert without rows.
        notes: sentences on experts with few rows or none, for plans and reports.

    Example:
        >>> cut = rd.prune_width(torch.eye(4)[None], torch.diag(torch.arange(1.0, 5))[None], 3)
        >>> cut.neurons
        tensor([[1, 2, 3]])
        >>> cut.error
        tensor([0.1000], dtype=torch.float64)
    """

    neurons: Tensor
    down: Tensor
    error: Tensor
    notes: tuple[str, ...]


@typed
def prune_width(
    down: Tensor | Sequence[Tensor],
    gram: LayerGram | Tensor,
    keep: int,
    *,
    ridge: float = RIDGE,
    experts: Sequence[int] | None = None,
) -> WidthCut:
    """Removes neurons of a layer's experts and corrects the down projections by least squares.

    For one expert with down projection W and the Gram A = sum over rows of g^2 h h^T of its inner
    activations, neurons are removed one by one (Optimal Brain Surgeon), each time the one whose
    removal costs least once the others are corrected. Then W' minimizes

        sum over rows of g^2 ||W h - W' h_kept||^2 + shift ||W' - W_kept||^2

    with the shift `ridge` times the mean of A's diagonal: W' = W A[:, kept] A[kept, kept]^-1, where
    the shift is added to A's diagonal.

    The fewer the rows, the less a Gram says about other text: the ridge of an expert is at least
    (I / rows)^2, which exceeds the default below 32 I rows. An expert without rows keeps the
    neurons whose columns of W are the longest, uncorrected. The notes name the experts without rows
    and those with fewer than 2 I.

    Args:
        down: [E, H, I], stacked or one [H, I] per expert; bf16, fp16, fp32 or fp64.
        gram: of the layer, from `reap_kernels.gram`, `observe_layer(gram=)` or
            `rd.observe(model, gram=True)`; or [E, I, I] tensors, of which the lower triangles are
            read, if the numbers of rows are not known.
        keep: I', the neurons that each expert keeps, 1 <= I' <= I.
        ridge: 0 or more.
        experts: ids of the experts to cut, in the order of the result; default all.

    Returns:
        The neurons, new down projections and errors, on the device of `gram`. All arithmetic is in
        float64 and `down` is rounded once. Same bits on every run on one machine.

        It costs about I^3 + H I^2 + 4 I^2 (I - I') multiplications per expert and works on 0.5 GB
        at a time.

    Raises:
        ShapeError: shapes do not fit each other, or there are not that many neurons.
        DtypeError: a tensor is not floating point.
        DataError: a Gram or matrix is not finite, or a Gram is singular and the ridge is 0; the
            message names the expert.
        UsageError: the ridge is negative or not finite, or there is no such expert.

    Example:
        >>> h = torch.randn(500, 16)  # inner activations of the rows of one expert
        >>> down = torch.randn(1, 32, 16)
        >>> cut = rd.prune_width(down, (h.T @ h)[None], keep=12)
        >>> cut.down.shape, cut.neurons.shape
        (torch.Size([1, 32, 12]), torch.Size([1, 12]))
    """
    order = width_order(down, gram, least=keep, ridge=ridge, experts=experts)
    return cut_width(down, gram, order, keep, experts=experts)


def width_order(
    down: Tensor | Sequence[Tensor],
    gram: LayerGram | Tensor,
    *,
    least: int = 1,
    ridge: float = RIDGE,
    experts: Sequence[int] | None = None,
) -> WidthOrder:
    """The order in which the neurons of each expert can go, down to `least` of them.

    It serves all widths from `least` to I; see `prune_width` for the arguments.
    """
    layer = Layer.of(down, gram, experts)
    layer.check_keep(least)
    shift = layer.shifts(ridge)
    parts: list[tuple[Tensor, ...]] = []
    for part in _parts(layer):
        matrices, plain = layer.down(part), layer.gram(part)
        product = matrices.mT @ matrices
        energy = (product * plain).sum((1, 2))
        factor = _cholesky(_shifted(plain, shift[part]), layer.ids[part], ridge)
        found = eliminate(torch.cholesky_inverse(factor), product, layer.width - least)
        parts.append((found.neurons, found.costs, energy))
    removed, costs, energy = (torch.cat(column) for column in zip(*parts, strict=True))
    return WidthOrder(removed, costs, energy, shift, layer.width, layer.notes())


def cut_width(
    down: Tensor | Sequence[Tensor],
    gram: LayerGram | Tensor,
    order: WidthOrder,
    keep: int,
    *,
    experts: Sequence[int] | None = None,
) -> WidthCut:
    """The cut to width `keep` in an order that is known.

    Args:
        down, gram, experts: as given to `width_order`.
        order: of these experts.
        keep: I'.
    """
    layer = Layer.of(down, gram, experts)
    kept, gone = order.kept(keep), order.gone(keep)
    matrices = torch.empty(len(kept), layer.hidden, keep, dtype=layer.dtype, device=kept.device)
    lost = torch.empty(len(kept), dtype=torch.float64, device=kept.device)
    for part in _parts(layer):
        w, plain, shift = layer.down(part), layer.gram(part), order.shift[part]
        inside = _shifted(_block(plain, kept[part], kept[part]), shift)
        across = _block(plain, kept[part], gone[part])
        factor = _cholesky(inside, layer.ids[part], ridge=None)
        moved = torch.cholesky_solve(across, factor)  # [b, I', I - I']
        w_kept, w_gone = _columns(w, kept[part]), _columns(w, gone[part])
        matrices[part] = torch.baddbmm(w_kept, w_gone, moved.mT).to(layer.dtype)
        rest = _block(plain, gone[part], gone[part]) - moved.mT @ across
        rest -= shift[:, None, None] * (moved.mT @ moved)
        lost[part] = ((w_gone @ rest) * w_gone).sum((1, 2))
    return WidthCut(kept, matrices, _relative(lost, order.energy), order.notes)


def _parts(layer: Layer) -> Iterator[slice]:
    """Runs of experts that are worked on together."""
    each = 8 * layer.width * (layer.hidden + 6 * layer.width)
    size = max(1, _WORK_BYTES // each)
    return (slice(start, start + size) for start in range(0, len(layer.ids), size))


def _shifted(gram: Tensor, shift: Tensor) -> Tensor:
    """A copy with `shift` added to the diagonals."""
    shifted = gram.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(shift[:, None])
    return shifted


def _cholesky(gram: Tensor, ids: Sequence[int], ridge: float | None) -> Tensor:
    """Lower factors of Grams [B, I, I].

    Raises:
        DataError: one is singular.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        expert = ids[int(failed.nonzero()[0])]
        remedy = f"use a ridge of {RIDGE:g}" if not ridge else "raise the ridge or observe again"
        raise DataError(f"the Gram of expert {expert} is not positive definite; {remedy}")
    return factor


def _block(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """matrix[b, rows[b], columns[b]]: [B, n, m]."""
    every = torch.arange(len(matrix), device=matrix.device)[:, None, None]
    return matrix[every, rows[:, :, None], columns[:, None, :]]


def _columns(matrices: Tensor, columns: Tensor) -> Tensor:
    """matrices[b, :, columns[b]]: [B, H, n]."""
    return matrices.gather(2, columns[:, None, :].expand(-1, matrices.shape[1], -1))


def _relative(error: Tensor, energy: Tensor) -> Tensor:
    """error / energy, at least 0; 0 where there is no energy."""
    return torch.where(energy > 0, error.clamp(min=0) / energy, torch.zeros_like(energy))
