"""Solves the down projections of a layer's experts again, for what a cut took from its output."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.compensation.gradients import Problem, Total, correlate, fitted
from reap_driver.compensation.pilot import Pilot, RefitSums
from reap_driver.compensation.rows import ExpertRows, Rows
from reap_kernels import ExpertWeights, LayerGram, observe_layer
from reap_kernels.errors import DataError, ShapeError, UsageError

STEPS = 2


@dataclass(frozen=True)
class LayerRefit:
    """Down projections that were solved again.

    Attributes:
        down: [E, H, I], new down projections in the dtype of the old ones, on their device.
        ridge: relative to the mean of the diagonals of the Gram matrices; 0 where nothing was
            solved because no token was routed.
        error_before: mean over held-out tokens of ||missing||^2, in float64.
        error_after: the same with the solution, before it is rounded to the weights' dtype.
        kept: whether the solution is better on the held-out tokens; if not, `down` is unchanged.

    Example:
        >>> rd.LayerRefit(torch.zeros(4, 24, 16), 0.03, 2.0, 1.5, True).gain
        0.25
    """

    down: Tensor
    ridge: float
    error_before: float
    error_after: float
    kept: bool

    @property
    def gain(self) -> float:
        """Share of the error that the solution takes away."""
        return 1 - self.error_after / self.error_before if self.error_before else 0.0


@typed
@torch.no_grad()
def refit_layer(
    experts: ExpertWeights,
    rows: Sequence[ExpertRows],
    *,
    ridge: float | None = None,
    steps: int = STEPS,
    backend: str | None = None,
) -> LayerRefit:
    """Changes the down projections of a layer's experts so that their output has what it lacks.

    With W_j the down projections, g_tj and h_tj the router weight and inner activation of token t
    at expert j, the changes D of all experts together minimize

        sum over fitted tokens of ||m_t - sum_j D_j g_tj h_tj||^2 + lambda ||D||^2

    with m_t what is missing: target minus present output. lambda is a ridge times the mean of the
    diagonals of the Gram matrices A_j = sum g^2 h h^T. Conjugate gradients solve it, preconditioned
    by (A_j + lambda)^-1; two steps come close to the solution.

    Without `ridge`, ridges from 1e-3 to 3 are tried on a quarter of the fitted batches, all at once
    on random projections of what is missing. The one of the least error on held-out batches is
    taken, after a parabola through it and its neighbors.

    Costs, in passes of the rows through the experts: one for the Gram matrices, two per step, and
    less than one to choose the ridge. Memory: five times the down projections in float32, two Gram
    matrices per expert, and two tensors [T, H] per batch.

    Args:
        experts: the layer's weights, float.
        rows: the batches, on the device of the weights; some of them held out.
        ridge: above 0; None chooses it.
        steps: of conjugate gradients.
        backend: of the products, without fallback; None for the best one.

    Raises:
        ShapeError, DtypeError: rows that do not fit the experts.
        DataError: no token is fitted, none is held out to choose the ridge by, or a value is not
            finite.
        UsageError: the ridge or the number of steps is not possible.

    Example:
        >>> up, down = torch.randn(4, 32, 24), torch.randn(4, 24, 16)
        >>> experts = rk.ExpertWeights(up, down, rk.Activation("silu"))
        >>> old = rk.ExpertWeights(up, down + 0.5, experts.activation)
        >>> rows = []
        >>> for number in range(4):
        ...     hidden, ids = torch.randn(200, 24), torch.randint(0, 4, (200, 1))
        ...     given = (hidden, ids, torch.ones(200, 1))
        ...     missing = rk.observe_layer(*given, experts) - rk.observe_layer(*given, old)
        ...     rows.append(rd.ExpertRows(*given, missing, held_out=number == 3))
        >>> found = rd.refit_layer(old, rows)
        >>> found.kept, found.error_after < 0.01 * found.error_before
        (True, True)
    """
    held = [batch.held_out for batch in rows]
    sizes = experts.num_experts, experts.intermediate_size
    sums = RefitSums(*sizes, held, experts.device)
    check_numbers(ridge, steps)
    _check_rows(rows)
    for number, batch in enumerate(rows):
        given = (batch.hidden, batch.ids, batch.weights, experts)
        gram = sums.of(number)
        if gram is not None:
            observe_layer(*given, mask=batch.mask, gram=gram, backend=backend)
    return solve(experts, list(rows), sums, ridge=ridge, steps=steps, backend=backend)


@torch.no_grad()
def solve(
    experts: ExpertWeights,
    rows: Rows,
    sums: RefitSums,
    *,
    ridge: float | None = None,
    steps: int = STEPS,
    scale: float = 1.0,
    total: Total = lambda _: None,
    backend: str | None = None,
) -> LayerRefit:
    """`refit_layer` of rows whose Gram matrices are known, on one rank or several.

    Args:
        experts, ridge, steps, backend: as in `refit_layer`.
        rows: batches by number; `missing` is what the solution leaves of it when this returns, also
            where it is not kept.
        sums: of these rows; changed.
        scale: what is missing lacks this many times the sum of the experts' outputs.
        total: adds tensors in place over the ranks that share the rows; every rank must call this.
    """
    total([tensor for gram in (sums.pilot, sums.rest) for tensor in gram.packed()])
    before = _errors(rows, total)
    _check_errors(before, ridge)
    mean = _mean(sums.pilot) + _mean(sums.rest)
    if mean == 0:
        return LayerRefit(_stacked(experts), 0.0, _held(before), _held(before), kept=False)
    right = _like_down(experts)
    for number in sums.pilot_numbers:
        correlate(experts, rows[number], right, backend)
    if ridge is None:
        pilot = Pilot(experts, rows, sums, mean, steps, total, backend)
        ridge = pilot.ridge(right)
    for number, batch in fitted(rows):
        if number not in sums.pilot_numbers:
            correlate(experts, batch, right, backend)
    total([right])
    block = torch.zeros(experts.hidden_size, dtype=torch.int64, device=right.device)
    gram = sums.rest.merge_(sums.pilot)
    change = Problem(experts, rows, gram, [ridge * mean], block, total, backend).solve(steps, right)
    after = _errors(rows, total)
    kept = _held(after) < _held(before)
    down = _changed(experts, change.div_(scale)) if kept else _stacked(experts)
    return LayerRefit(down, ridge, _held(before), _held(after), kept)


def check_numbers(ridge: float | None, steps: int) -> None:
    """Raises UsageError for numbers that are not possible."""
    if ridge is not None and not (math.isfinite(ridge) and ridge > 0):
        raise UsageError(f"ridge is {ridge:g}; give a number above 0, such as 0.03, or None")
    if steps < 1:
        raise UsageError(f"steps is {steps}; give 1 or more, such as {STEPS}")


def _check_rows(rows: Sequence[ExpertRows]) -> None:
    """Raises ShapeError for rows that are not possible."""
    for number, batch in enumerate(rows):
        if batch.missing.shape != batch.hidden.shape:
            raise ShapeError(
                f"missing of batch {number} has shape {tuple(batch.missing.shape)}; the experts' "
                f"input has {tuple(batch.hidden.shape)}, and both must be [T, H]"
            )


def _errors(rows: Rows, add: Total) -> Tensor:
    """[2, 2] float64 over all ranks: sum of ||missing||^2 and tokens, of fitted and of held-out
    batches.
    """
    found = torch.zeros(2, 2, dtype=torch.float64)
    for number in range(len(rows)):
        batch = rows[number]
        known = [float(batch.squares(batch.missing).sum()), float(batch.tokens)]
        found[int(batch.held_out)] += torch.tensor(known, dtype=torch.float64)
    add([found])
    return found


def _held(errors: Tensor) -> float:
    """The mean error of held-out tokens; of all where none is held out."""
    squares, tokens = errors[1] if errors[1, 1] else errors[0]
    return float(squares / tokens)


def _check_errors(errors: Tensor, ridge: float | None) -> None:
    """Raises DataError unless errors are finite, and tokens fitted and, if needed, held out."""
    if not bool(errors.isfinite().all()):
        raise DataError(
            "what is missing has NaN or Inf; look for them in the checkpoints and in the data"
        )
    fitted_tokens, held_tokens = errors[:, 1].tolist()
    if not fitted_tokens:
        raise DataError("no token is fitted; give batches that are not held out")
    if not held_tokens and ridge is None:
        raise DataError(
            "no token is held out to choose the ridge by; hold out some batches, or give `ridge`"
        )


def _mean(gram: LayerGram) -> float:
    """Mean over experts and neurons of the diagonals."""
    return float(gram.gram.diagonal(dim1=1, dim2=2).double().mean())


def _like_down(experts: ExpertWeights) -> Tensor:
    """Zeros of the shape of the down projections, float32 [E, H, I]."""
    shape = (experts.num_experts, experts.hidden_size, experts.intermediate_size)
    return torch.zeros(shape, dtype=torch.float32, device=experts.device)


def _stacked(experts: ExpertWeights) -> Tensor:
    """A copy of the down projections, [E, H, I]."""
    return torch.stack([experts.down[expert] for expert in range(experts.num_experts)])


def _changed(experts: ExpertWeights, change: Tensor) -> Tensor:
    """Down projections plus a change, rounded once."""
    new = [
        (experts.down[expert].double() + own.double()).to(experts.dtype)
        for expert, own in enumerate(change)
    ]
    return torch.stack(new)
