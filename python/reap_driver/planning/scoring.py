"""Scores of every layer's experts by a criterion, with calibration groups weighted if asked."""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.planning.criteria import CRITERIA, Criterion, Scores, checked_criterion
from reap_driver.planning.custom_criteria import scored_by
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import DataError, PlanError


@typed
def score(
    stats: SaliencyStats,
    criterion: str | Callable[[LayerStats], Tensor | Sequence[float]] = "reap",
    weights: Mapping[str, float] | None = None,
    *,
    name: str | None = None,
) -> Scores:
    """Scores the experts of every layer.

    Args:
        stats: observed statistics.
        criterion: a name, see `reap_driver.planning.criteria`; or a function that takes the
            `LayerStats` of a layer (fields [G, E] on the CPU, groups in the order of
            `stats.groups`) and returns [E] finite numbers, where higher scores are kept.
        weights: {group: share}, one for every observed group, not negative; they are divided by
            their sum. The scores are then those of calibration data in which the groups have these
            shares of the tokens: sums and counts of group G are multiplied by share_G * T / T_G,
            where T_G are the tokens that the layer saw in the group and T those of all groups. A
            share of 0 leaves a group out. `max_activation`, which is no sum, takes the maximum over
            the groups with a share above 0. None: the groups as observed. Not for a function, which
            sees all groups.
        name: of a function, in plans, cards and reports; by default its own name.

    Returns:
        {layer: float64 [E]} on the CPU.

    Raises:
        PlanError: the criterion is unknown, or its sum is not recorded; the weights do not name
            exactly the observed groups, or are negative, not finite or all 0; or a function does
            not return one finite number per expert.
        DataError: there is no layer; the statistics lack what the criterion needs; an expert's
            output had NaN or Inf; a layer saw no token, or none of a group with a share above 0; or
            scores leave the range of float64.

    Example:
        >>> rd.score(stats, lambda layer: layer.total().norm_sum[0], name="work").criterion
        'work'
    """
    if not stats.layers:
        raise DataError("the statistics have no layer, so there is nothing to score; observe again")
    if not isinstance(criterion, str):
        return _own(stats, criterion, weights, name)
    if name is not None:
        raise PlanError(f"name {name!r} is for a function; criterion {criterion!r} has its own")
    found = checked_criterion(criterion)
    _check_recorded(stats, criterion, found)
    wanted = None if weights is None else shares(stats.groups, weights)
    stats.check_finite()
    if found.field:
        values = {
            name: _score_layer(name, layer, stats.groups, found, wanted)
            for name, layer in stats.layers.items()
        }
    else:
        sizes = {name: layer.num_experts for name, layer in stats.layers.items()}
        values = random_values(sizes, found.seed)
    return Scores(values, criterion=criterion, weights=weights, provenance=stats.provenance)


def _check_recorded(stats: SaliencyStats, name: str, criterion: Criterion) -> None:
    """Raises DataError where statistics of another tool lack a field that a criterion needs."""
    lacking = set(stats.missing)
    wanted = [field for field in criterion.fields if field in lacking]
    if wanted:
        possible = [one for one, other in CRITERIA.items() if lacking.isdisjoint(other.fields)]
        raise DataError(
            f"criterion {name!r} needs {' and '.join(wanted)}, not recorded in these statistics, "
            f"which another tool observed; use one of {', '.join(possible)}, or observe the model "
            "with reap-kernels"
        )


def _own(
    stats: SaliencyStats,
    criterion: Callable[[LayerStats], Tensor | Sequence[float]],
    weights: Mapping[str, float] | None,
    name: str | None,
) -> Scores:
    """Scores by a function."""
    if weights is not None:
        raise PlanError(
            "weights have no effect on a criterion of your own, which sees every group; weigh the "
            "groups in the function"
        )
    stats.check_finite()
    return scored_by(stats, criterion, name)


def random_values(sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Random scores, float64 [E] in [0, 1) for each layer; the same on every machine."""
    draw = random.Random(seed)
    return {
        name: torch.tensor([draw.random() for _ in range(experts)], dtype=torch.float64)
        for name, experts in sizes.items()
    }


def shares(groups: list[str], weights: Mapping[str, float]) -> list[float]:
    """Weights in the order of the groups, divided by their sum.

    Raises:
        PlanError: they do not name exactly the groups, are negative, not finite or all 0.
    """
    unknown, missing = sorted(set(weights) - set(groups)), sorted(set(groups) - set(weights))
    if unknown or missing:
        raise PlanError(
            f"weights name the groups {sorted(weights)}, but the statistics have {sorted(groups)}; "
            "give each observed group a weight (0 leaves a group out)"
        )
    values = [float(weights[group]) for group in groups]
    total = sum(values)
    if not math.isfinite(total) or min(values) < 0 or total <= 0:
        raise PlanError(
            f"weights are {dict(weights)}; they must be finite, not negative, and not all 0"
        )
    return [value / total for value in values]


def _score_layer(
    name: str,
    layer: LayerStats,
    groups: list[str],
    criterion: Criterion,
    shares: list[float] | None,
) -> Tensor:
    """Scores of one layer, float64 [E], checked."""
    layer = layer.to("cpu")
    if any(share > 0 and not n for share, n in zip(shares or [], layer.tokens, strict=False)):
        counted = dict(zip(groups, layer.tokens.tolist(), strict=True))
        raise DataError(
            f"layer {name}: a group with a weight above 0 has no tokens ({counted}); observe "
            "data of that group, or give it the weight 0"
        )
    factors = mix(layer.tokens, shares)
    rows = mixed(layer.count, factors)
    if not rows.any():
        raise DataError(
            f"layer {name}: no token was routed to any of its {layer.num_experts} experts, so they "
            "cannot be ranked; calibrate with data that reaches the layer (vision experts need "
            "images)"
        )
    if criterion.field == "out_max":
        used = factors > 0
        high, low = layer.out_max[used].amax(dim=0), layer.out_min[used].amin(dim=0)  # [E]
        peak = high.maximum(-low).double()  # -inf where never routed
        values = peak.where(rows > 0, peak.new_zeros(()))
    else:
        sums = mixed(getattr(layer, criterion.field), factors)
        values = family(sums, rows, criterion.b)
        lost = ((values == 0) & (sums != 0)).nonzero().flatten().tolist()
        if lost:
            raise DataError(
                f"layer {name}: scores of experts {lost[:8]} by {criterion.formula} are too small "
                "for float64, so they could not be told apart; use a smaller b"
            )
    if not values.isfinite().all():
        experts = (~values.isfinite()).nonzero().flatten().tolist()
        raise DataError(
            f"layer {name}: scores of experts {experts[:8]} by {criterion.formula} are not finite; "
            "check the router's weights, or load the model in a wider dtype"
        )
    return values


def mix(tokens: Tensor, shares: list[float] | None) -> Tensor:
    """Factors for the sums of each group, with which groups have these shares of the tokens.

    Args:
        tokens: [..., G], tokens of each group.
        shares: of the groups, adding to 1; None: as observed.

    Returns:
        float64 [..., G]: share_G * T / T_G, or 1.
    """
    observed = tokens.double()
    if shares is None:
        return observed.new_ones(observed.shape)
    wanted = observed.new_tensor(shares) * observed.sum(dim=-1, keepdim=True)
    return wanted / observed.clamp(min=1)


def mixed(sums: Tensor, factors: Tensor) -> Tensor:
    """The sum over groups of [..., G, E], each times its factor [..., G]; float64 [..., E]."""
    return (sums.double() * factors[..., None]).sum(dim=-2)


def family(sums: Tensor, rows: Tensor, b: float) -> Tensor:
    """n^-b * sum, for sums and numbers of rows [..., E]; 0 where there are no rows."""
    return (sums / rows**b).where(rows > 0, sums.new_zeros(()))
