"""How much scores, and the plan made from them, depend on which data happened to be observed.

Statistics that were kept in parts (`observe --folds 8`) can be scored with each part left out. How
much that changes a score gives its jackknife standard error; with P parts the error itself is known
from P - 1 differences only, so intervals use Student's t (Tukey 1958; for parts of unequal size the
delete-m_j jackknife of Busing, Meijer and van der Leeden 1999). The probability that an expert is
kept comes from a bootstrap with random multipliers: many draws of all scores of a layer together,
scattered as the parts say, each ranked by the plan's rule. Both are for criteria that are functions
of sums; a maximum has no such interval.

This measures the effect of the sample, not of the choice of data: two groups can each be certain of
their experts and disagree, which `rank_correlation` of their scores shows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from reap_driver.planning.budget import Router, ranked
from reap_driver.planning.criteria import Criterion, Scores, checked_criterion
from reap_driver.planning.plan import Plan
from reap_driver.planning.scoring import family, mix, mixed, score, shares
from reap_driver.planning.student_t import normal, student, t_quantile
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, PlanError

DRAWS = 400
# Experts are inside the decision margin if neither keeping nor removing them has this probability.
CERTAIN = 0.975


@dataclass(frozen=True)
class Uncertainty:
    """Scores of one layer with their uncertainty.

    Attributes:
        scores: float64 [E], of all data.
        deviations: float64 [P, E]: how each of P parts moves the scores; the sum of their outer
            products is the scores' covariance.
    """

    scores: Tensor
    deviations: Tensor

    @property
    def error(self) -> Tensor:
        """Standard error of each score, float64 [E]."""
        return self.deviations.square().sum(dim=0).sqrt()

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """(low, high), float64 [E] each, that hold the true scores with probability `level`.

        The true score is that of unlimited data of the same kind. Scores are never below 0.
        """
        half = t_quantile((1 + level) / 2, len(self.deviations) - 1) * self.error
        return (self.scores - half).clamp(min=0), self.scores + half


def uncertainty(
    stats: SaliencyStats, criterion: str = "reap", weights: Mapping[str, float] | None = None
) -> dict[str, Uncertainty]:
    """Scores of every layer with their uncertainty, by leaving out each part of the data.

    Args:
        stats: with at least two parts.
        criterion, weights: as for `reap_driver.score`.

    Raises:
        DataError: the statistics have no parts, or parts that do not add up to the whole; a layer
            or a group with a share above 0 has tokens in one part only.
        PlanError: the criterion is unknown, or no function of sums.
    """
    found = checked_criterion(criterion)
    if not found.is_sum:
        raise PlanError(
            f"criterion {criterion!r} is no function of sums, so parts of the data say nothing "
            "about its uncertainty; use another criterion"
        )
    check_parts(stats)
    scores = score(stats, criterion, weights)
    wanted = None if weights is None else shares(stats.groups, weights)
    return {
        name: Uncertainty(scores[name], _deviations(stats, name, scores[name], found, wanted))
        for name in stats.layers
    }


def keep_probability(
    stats: SaliencyStats, plan: Plan, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Tensor]:
    """The probability that the plan would keep each expert, given other data of the same kind.

    Criterion, weights, protected experts and the number that each layer keeps are the plan's.

    Args:
        stats: that the plan was made from, with at least two parts.
        plan: the plan.
        draws: of the scores.
        seed: of the draws; equal seeds give equal draws on every machine.

    Returns:
        {layer: float64 [E]} in [0, 1].

    Raises:
        DataError, PlanError: as `uncertainty`; or the plan is not of these statistics.
    """
    known = uncertainty(stats, plan.criterion, plan.weights)
    sizes = {name: len(one.scores) for name, one in known.items()}
    # A layer that only one of the two names is whole: no token reached it, or it is not planned.
    planned = {n: la.num_experts for n, la in plan.layers.items() if n in known or la.removed}
    if {**sizes, **planned} != sizes:
        raise PlanError(
            "the plan has other layers or numbers of experts than the statistics; make it from them"
        )
    parts = max(len(one.deviations) for one in known.values())
    noise = normal(draws, 2 * parts - 1, seed)
    found = {}
    for name, one in known.items():
        router = Router.of(name, stats.provenance.get("layers", {}).get(name, {}))
        drawn = one.scores + student(noise, len(one.deviations)) @ one.deviations
        protected = plan.settings.get("protected", {}).get(name, [])
        drawn[:, protected] = math.inf
        kept = len(plan.layers[name].kept) if name in plan.layers else sizes[name]
        keep = kept // router.n_group
        grouped = drawn.unflatten(-1, (router.n_group, -1)).unbind(dim=1)
        found[name] = torch.cat([_kept_share(values, keep) for values in grouped])
    return found


def margin(kept: Mapping[str, Tensor], certain: float = CERTAIN) -> dict[str, tuple[int, ...]]:
    """Experts whose removal or retention is uncertain.

    Args:
        kept: `keep_probability`.
        certain: those whose probability of being kept is strictly between 1 - certain and this.

    Returns:
        {layer: ids}, for layers that have any.
    """
    inside = {name: ((p > 1 - certain) & (p < certain)).nonzero() for name, p in kept.items()}
    return {name: tuple(ids.flatten().tolist()) for name, ids in inside.items() if len(ids)}


def halves(
    stats: SaliencyStats, criterion: str = "reap", weights: Mapping[str, float] | None = None
) -> tuple[Scores, Scores]:
    """Scores by the parts at even and at odd places, for `rank_correlation`.

    Raises:
        DataError, PlanError: as `uncertainty`, or as `reap_driver.score` of a half.
    """
    check_parts(stats)
    even, odd = (reduce(SaliencyStats.merge, stats.parts[start::2]) for start in (0, 1))
    return score(even, criterion, weights), score(odd, criterion, weights)


def group_scores(stats: SaliencyStats, criterion: str = "reap") -> dict[str, Scores]:
    """{group: scores by this group alone}."""
    return {
        group: score(stats, criterion, {other: float(other == group) for other in stats.groups})
        for group in stats.groups
    }


def rank_correlation(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """Spearman's correlation of two scorings of the same experts, layer by layer.

    Equal scores share the mean of their ranks.

    Args:
        a, b: {layer: float64 [E]}, such as `Scores`.

    Returns:
        {layer: correlation in [-1, 1]}; NaN where all scores of a layer are equal.

    Raises:
        PlanError: they are of different layers, or of different numbers of experts.
    """
    if {n: len(v) for n, v in a.items()} != {n: len(v) for n, v in b.items()}:
        raise PlanError(
            "scores are of different layers or numbers of experts; compare scores of one model"
        )
    found = {}
    for name in a:
        x, y = (ranks - ranks.mean() for ranks in (_ranks(a[name]), _ranks(b[name])))
        size = float(x.norm() * y.norm())
        found[name] = float(x @ y) / size if size else math.nan
    return found


def check_parts(stats: SaliencyStats) -> None:
    """Checks that there are at least two parts and that they add up to the whole.

    Raises:
        DataError: they do not.
    """
    if len(stats.parts) < 2:
        raise DataError(
            f"the statistics have {len(stats.parts)} parts of the data, and how far scores depend "
            "on the data shows only between parts; observe with `folds=8`"
        )
    for name, layer in stats.layers.items():
        counts = torch.stack([part.layers[name].counts.cpu() for part in stats.parts]).sum(dim=0)
        if not torch.equal(counts, layer.counts.cpu()):
            raise DataError(
                f"layer {name}: the parts do not add up to the whole; observe again with `folds`"
            )


def _deviations(
    stats: SaliencyStats,
    name: str,
    whole: Tensor,
    criterion: Criterion,
    shares: list[float] | None,
) -> Tensor:
    """Signed square roots of the jackknife variance of each part, float64 [P, E].

    With n tokens, m_j of them in part j, h_j = n / m_j, s the score and s_(j) that without part j,
    the pseudo-values h_j s - (h_j - 1) s_(j) scatter around the jackknife estimate
    P s - sum (1 - m_j / n) s_(j), each with weight 1 / (P (h_j - 1)).
    """
    parts = [part.layers[name] for part in stats.parts]
    parts = [part for part in parts if part.tokens.any()]
    if len(parts) < 2:
        raise DataError(
            f"layer {name}: one part of the data holds all its tokens, so it says nothing about "
            "uncertainty; observe more sequences"
        )
    tokens = torch.stack([part.tokens.cpu() for part in parts]).double()  # [P, G]
    total = tokens.sum()
    others = 1 - torch.eye(len(parts), dtype=torch.float64)  # [P, P]: without each part
    left = _without(others, tokens)
    for group, share, seen in zip(stats.groups, shares or [], left.T, strict=False):
        if share > 0 and not seen.all():
            raise DataError(
                f"layer {name}: one part of the data holds all tokens of group {group!r}, so it "
                "says nothing about uncertainty; observe more sequences of the group"
            )
    # Sums are brought to as many tokens as the whole has.
    factors = mix(left, shares) * (total / left.sum(dim=-1, keepdim=True))
    counts, sums = (
        _without(others, torch.stack([getattr(part, field).cpu() for part in parts]).double())
        for field in ("count", criterion.field)
    )
    without = family(mixed(sums, factors), mixed(counts, factors), criterion.b)  # [P, E]
    part = tokens.sum(dim=-1, keepdim=True) / total  # m_j / n, [P, 1]
    pseudo = whole / part - (1 / part - 1) * without
    estimate = len(parts) * whole - ((1 - part) * without).sum(dim=0)
    return (pseudo - estimate) / (len(parts) * (1 / part - 1)).sqrt()


def _without(others: Tensor, values: Tensor) -> Tensor:
    """Sums over the other parts, of values [P, ...]; exactly 0 where only this part has any."""
    return (others @ values.flatten(1)).reshape(values.shape)


def _kept_share(values: Tensor, keep: int) -> Tensor:
    """Share of the draws [D, E] in which each expert is among the `keep` highest; float64 [E]."""
    size = values.shape[1]
    if keep == size:
        return values.new_ones(size)
    # In every draw the lowest kept score lies between these two, so only experts whose scores
    # reach that range need ranking.
    low, high = values.amin(dim=0), values.amax(dim=0)
    floor, ceiling = (bound.topk(keep).values[-1] for bound in (low, high))
    found = (low > ceiling).double()
    open_ = ((low <= ceiling) & (high >= floor)).nonzero().flatten()
    places = keep - int(found.sum())
    best = ranked(values[:, open_], 1)[:, 0, :places]  # [D, places]
    found[open_] = best.flatten().bincount(minlength=len(open_)).double() / len(values)
    return found


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ascending; equal values share the mean of theirs. float64 [E]."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(dim=0)
    return (last - (counts - 1) / 2)[place].double()
