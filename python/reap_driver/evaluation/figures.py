"""Means over predictions, with 95 % intervals, from sums over sequences.

Tokens of one sequence are not independent, so the percentile bootstrap resamples sequences: within
each calibration group it draws, with replacement, as many sequences as the group has, so the
groups' shares stay fixed. Figures are ratios of sums, and both models use the same draws.
Percentiles are those of the expanded percentile interval (Hesterberg, "What Teachers Should Know
about the Bootstrap", arXiv 1411.5279), because plain ones are too narrow for few sequences.
In simulations the intervals cover the truth in 90 to 96 % of cases from 10 sequences on; for very
skewed values (lognormal, sigma 0.9) in 86 % with 10 sequences, 90 % with 40 and 92 % with 100.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from reap_driver.planning.student_t import t_quantile

DRAWS = 2000
CONFIDENCE = 0.95
_AT_ONCE = 1 << 22  # sequences drawn at a time, over all draws


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; the bounds are None if a group has only one sequence."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Figures:
    """How a pruned model compares with its original on some sequences; means over predictions.

    Attributes:
        sequences: number of sequences with at least one prediction that counts.
        predictions: number of predictions that count.
        original_perplexity: exp of the original's mean negative log-likelihood of the text.
        pruned_perplexity: the same for the pruned model.
        perplexity_ratio: pruned_perplexity / original_perplexity.
        kl: KL(original || pruned), in nats.
        acceptance: expected acceptance, sum over v of min(p_v, q_v), in [0, 1]; see
            `reap_kernels.compare_logits`.
        same_top: share of predictions with the same most likely token, in [0, 1].
    """

    sequences: int
    predictions: int
    original_perplexity: Estimate
    pruned_perplexity: Estimate
    perplexity_ratio: Estimate
    kl: Estimate
    acceptance: Estimate
    same_top: Estimate


@dataclass(frozen=True)
class Difference:
    """How one pruned model compares with another of the same original, on the same sequences.

    Attributes:
        perplexity_ratio: its perplexity / that of the other.
        kl: its KL divergence from the original minus that of the other, in nats.
        acceptance: its expected acceptance minus that of the other.
        same_top: its share of equal most likely tokens minus that of the other.
    """

    perplexity_ratio: Estimate
    kl: Estimate
    acceptance: Estimate
    same_top: Estimate


# Columns of the sums over a sequence's predictions.
COLUMNS = ("original_loss", "pruned_loss", "kl", "acceptance", "same_top")


def figures(sums: Tensor, counts: Tensor, groups: Tensor, draws: int, seed: int) -> Figures:
    """Means over predictions, and their intervals.

    Args:
        sums: float64 [S, 5], sums of `COLUMNS` over the predictions of each sequence.
        counts: int64 [S], predictions of each sequence, above 0.
        groups: int64 [S], calibration group of each sequence.
        draws: samples of the bootstrap.
        seed: seed of the bootstrap; equal arguments give equal intervals.
    """
    data = torch.cat([sums, counts.double()[:, None]], dim=1)
    estimates = _estimates(_means, data, groups, draws, seed)
    return Figures(len(counts), int(counts.sum()), *estimates)


def difference(
    sums: Tensor, other: Tensor, counts: Tensor, groups: Tensor, draws: int, seed: int
) -> Difference:
    """How a pruned model compares with another one; both get the same draws of the bootstrap.

    Args:
        sums, other: float64 [S, 5] of each, as in `figures`.
        counts, groups, draws, seed: as in `figures`, the same for both.
    """
    data = torch.cat([sums, other, counts.double()[:, None]], dim=1)
    return Difference(*_estimates(_differences, data, groups, draws, seed))


def _estimates(
    estimate: Callable[[Tensor], Tensor], data: Tensor, groups: Tensor, draws: int, seed: int
) -> list[Estimate]:
    """The K estimates of `estimate`, each with its interval; see `intervals`."""
    found = estimate(data.sum(dim=0, keepdim=True))[0]
    ranges = intervals(estimate, data, groups, draws, seed)
    return [
        Estimate(float(found[i]), *(None, None) if ranges is None else map(float, ranges[:, i]))
        for i in range(len(found))
    ]


def intervals(
    estimate: Callable[[Tensor], Tensor], data: Tensor, groups: Tensor, draws: int, seed: int
) -> Tensor | None:
    """95 % intervals of estimates that are functions of sums over sequences.

    Args:
        estimate: maps sums [draws, C] to estimates [draws, K].
        data: float64 [S, C], the summands of each sequence.
        groups: int64 [S], calibration group of each sequence.
        draws: samples of the bootstrap.
        seed: seed of the bootstrap; equal arguments give equal intervals.

    Returns:
        float64 [2, K], lower and upper bounds; None if a group has only one sequence.
    """
    sizes = torch.bincount(groups)
    if int(sizes[sizes > 0].min()) < 2:
        return None
    drawn = estimate(_drawn(data, groups, draws, seed))
    tail = _tail(len(data), int((sizes > 0).sum()))
    return torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)


def _means(totals: Tensor) -> Tensor:
    """Estimates [draws, 6], in the order of `Figures`, from sums [draws, 6]."""
    original, pruned, *rest = (totals[:, :-1] / totals[:, -1:]).unbind(dim=1)
    return torch.stack([original.exp(), pruned.exp(), (pruned - original).exp(), *rest], dim=1)


def _differences(totals: Tensor) -> Tensor:
    """Estimates [draws, 4], in the order of `Difference`, from sums [draws, 11]."""
    columns = len(COLUMNS)
    mine, other = totals[:, :columns], totals[:, columns:-1]
    _, loss, *rest = ((mine - other) / totals[:, -1:]).unbind(dim=1)
    return torch.stack([loss.exp(), *rest], dim=1)


def _drawn(data: Tensor, groups: Tensor, draws: int, seed: int) -> Tensor:
    """Sums over resampled sequences, float64 [draws, C]."""
    rng = torch.Generator().manual_seed(seed)
    totals = torch.zeros(draws, data.shape[1], dtype=torch.float64)
    for group in groups.unique().tolist():
        own = data[groups == group]
        together = max(1, _AT_ONCE // len(own))
        for start in range(0, draws, together):
            size = min(together, draws - start)
            picked = torch.randint(len(own), (size, len(own)), generator=rng)
            times = torch.zeros(size, len(own), dtype=torch.float64)
            times.scatter_add_(1, picked, torch.ones_like(times))
            totals[start : start + size] += times @ own
    return totals


def _tail(sequences: int, groups: int) -> float:
    """Probability outside the interval on each side, expanded for few sequences.

    A bootstrap of n sequences underestimates the spread by sqrt((n - 1) / n), and as the spread is
    itself estimated, Student's t quantile takes the place of the normal one.
    """
    degrees = sequences - groups
    wide = t_quantile((1 + CONFIDENCE) / 2, degrees) * math.sqrt(sequences / degrees)
    return NormalDist().cdf(-wide)
