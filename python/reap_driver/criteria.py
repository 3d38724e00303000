"""Criteria: from the statistics of a layer to one score an expert, the higher the worthier.

All but two are members of one family. With g the gate weight and f the output of an expert, over
the n rows routed to it,

    S(b, alpha, p) = n^-b * sum g^alpha ||f||^p

so that b = 1 takes a mean and b = 0 a sum. `reap` is S(1, 1, 1), equation 9 of the REAP paper
(arXiv 2510.13999). Any member whose sum is recorded can be named so: "S(0.5, 1, 1)". The others are
`max_activation`, and `random` or `random:SEED`, which looks at nothing, to compare with. An expert
that no row was routed to scores 0.

Nothing here imports torch when the module is imported: `--help` lists the criteria.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reap_driver.arguments import typed

if TYPE_CHECKING:
    from torch import Tensor

    from reap_kernels import LayerStats, SaliencyStats

    _Values = dict[str, Tensor]
else:
    _Values = dict


@dataclass(frozen=True)
class Criterion:
    """One way to score experts.

    Attributes:
        formula: how people write it.
        field: the recorded sum it starts from (see `reap_kernels.LayerStats`); `out_max` stands for
            the largest absolute element, and "" for nothing: neither is a sum.
        b: power of the number of rows that it is divided by; 1 for a mean, 0 for a sum.
        seed: of random scores.
    """

    formula: str
    field: str
    b: float = 0
    seed: int = 0

    @property
    def is_sum(self) -> bool:
        """Whether it is of the family, so that shares of the data have scores that can be mixed."""
        return self.field in RECORDED.values()


# (alpha, p) of the sums that are recorded -> the field that holds them.
RECORDED: dict[tuple[float, float], str] = {
    (0, 0): "count",
    (1, 0): "gate_sum",
    (0, 1): "norm_sum",
    (1, 1): "gate_norm_sum",
    (0, 2): "norm_sq_sum",
    (2, 2): "gate_norm_sq_sum",
}

CRITERIA: dict[str, Criterion] = {
    "reap": Criterion("mean g ||f||", "gate_norm_sum", b=1),  # S(1, 1, 1), paper eq. 9
    "reap_l2": Criterion("mean (g ||f||)^2", "gate_norm_sq_sum", b=1),  # S(1, 2, 2)
    "frequency": Criterion("n, rows routed", "count"),  # S(0, 0, 0)
    "weighted_frequency": Criterion("sum g", "gate_sum"),  # S(0, 1, 0)
    "ean_sum": Criterion("sum ||f||", "norm_sum"),  # S(0, 0, 1)
    "ean_mean": Criterion("mean ||f||", "norm_sum", b=1),  # S(1, 0, 1)
    "weighted_ean": Criterion("sum g ||f||", "gate_norm_sum"),  # S(0, 1, 1)
    "msan": Criterion("mean ||f||^2", "norm_sq_sum", b=1),  # S(1, 0, 2)
    "max_activation": Criterion("largest |element of f|", "out_max"),
}

_NUMBER = r"\s*([0-9]*\.?[0-9]+)\s*"
_GENERIC = re.compile(rf"S\({_NUMBER},{_NUMBER},{_NUMBER}\)")
_RANDOM = re.compile(r"random(?::([0-9]{1,18}))?")


def criterion_named(name: str) -> Criterion:
    """The criterion of a name of `CRITERIA`, `S(b,alpha,p)`, `random` or `random:SEED`.

    Raises:
        ValueError: there is none; the message says what there is.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    if found := _RANDOM.fullmatch(name):
        return Criterion("a random number", "", seed=int(found[1] or 0))
    if found := _GENERIC.fullmatch(name):
        b, alpha, p = (float(number) for number in found.groups())
        if (alpha, p) in RECORDED:
            return Criterion(f"n^-{b:g} sum g^{alpha:g} ||f||^{p:g}", RECORDED[alpha, p], b=b)
        pairs = ", ".join(f"({a:g}, {p:g})" for a, p in RECORDED)
        raise ValueError(
            f"criterion {name!r} needs sum g^{alpha:g} ||f||^{p:g}, which is not recorded; (alpha, "
            f"p) can be {pairs}"
        )
    raise ValueError(
        f"criterion {name!r} is unknown; choose one of {', '.join(CRITERIA)}, S(b,alpha,p) or "
        "random:SEED"
    )


def known_criterion(name: str) -> Criterion | None:
    """The criterion of a name; None where it is not of this package, so that nothing is known of
    it.
    """
    try:
        return criterion_named(name)
    except ValueError:
        return None


def named(name: str) -> str:
    """A criterion with its formula, where it has one that is known."""
    found = known_criterion(name)
    return name if found is None else f"{name}: {found.formula}"


def is_reserved(name: str) -> bool:
    """Whether a name means a criterion of this package, or looks as if it did."""
    return name in CRITERIA or bool(_RANDOM.fullmatch(name) or _GENERIC.fullmatch(name))


class Scores(_Values):
    """Scores of every MoE layer: {layer name: float64 tensor [E]}, with where they came from.

    Attributes:
        criterion: name of the criterion.
        weights: share of each calibration group the scores were made for; None: as observed.
        model: provenance of the model (`id`, `config_digest`, ...).
        layers: what is known of each layer (`num_experts`, `top_k`, `n_group`, `topk_group`, ...).
        data: provenance of the calibration data, one entry a source.
        unobserved: MoE layers of the model that no token reached, so they have no scores.
        notes: what a reader of a plan made from them should know.
        stacks: field that counts experts -> the layers it counts, where some are unobserved; of
            layers that are in none, nothing is known.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        criterion: str,
        weights: Mapping[str, float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(values)
        known = provenance or {}
        self.criterion = criterion
        self.weights = dict(weights) if weights is not None else None
        self.model: dict[str, Any] = dict(known.get("model") or {})
        self.layers: dict[str, dict[str, Any]] = dict(known.get("layers") or {})
        self.data: list[dict[str, Any]] = list(known.get("data") or [])
        self.unobserved: list[str] = list(known.get("unobserved") or [])
        self.notes: list[str] = list(known.get("notes") or [])
        self.stacks: dict[str, list[str]] = dict(known.get("stacks") or {})

    def digest(self) -> str:
        """`sha256:...` over criterion, weights, layer names and the bits of every score."""
        head = json.dumps([self.criterion, self.weights, list(self)], sort_keys=True)
        digest = hashlib.sha256(head.encode())
        for values in self.values():
            digest.update(values.cpu().contiguous().numpy().astype("<f8").tobytes())
        return "sha256:" + digest.hexdigest()


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
        criterion: a name, see `criterion_named`; or a function of a layer's `LayerStats` (fields
            [G, E] on the CPU, the groups in the order of `stats.groups`) that returns a score for
            each expert, [E], the higher the worthier.
        weights: {group: share}, one for every observed group, not negative; they are divided by
            their sum. Sums and counts of group G are then multiplied by share_G * T / T_G, where
            T_G are the tokens the layer saw in the group and T those of all groups: the scores are
            what a calibration set with those shares of tokens would have given. A share of 0 leaves
            a group out. None takes the groups as they were observed. Extrema have no amount:
            `max_activation` takes the maximum over groups with a share above 0. A function sees
            all groups and has no use for them.
        name: of a function, in plans, cards and reports; default its own.

    Returns:
        {layer: float64 [E]} on the CPU.

    Raises:
        PlanError: unknown criterion, or one whose sum is not recorded; weights that do not name
            exactly the observed groups, or are negative, not finite or all 0; a function that does
            not return a finite number for each expert.
        DataError: there is no layer; an expert produced NaN or Inf; a layer saw no token, or no
            token of a group with a share above 0; scores leave the range of float64.

    Example:
        >>> score(stats, lambda layer: layer.total().norm_sum[0], name="work").criterion
        'work'
    """
    from reap_kernels.errors import DataError, PlanError

    if not stats.layers:
        raise DataError("the statistics have no layer, so there is nothing to score; observe again")
    if not isinstance(criterion, str):
        return _own(stats, criterion, weights, name)
    if name is not None:
        raise PlanError(f"name {name!r} is for a function; criterion {criterion!r} has its own")
    found = checked_criterion(criterion)
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


def _own(
    stats: SaliencyStats,
    criterion: Callable[[LayerStats], Tensor | Sequence[float]],
    weights: Mapping[str, float] | None,
    name: str | None,
) -> Scores:
    """Scores by a function."""
    from reap_driver.own_criteria import scored_by
    from reap_kernels.errors import PlanError

    if weights is not None:
        raise PlanError(
            "weights have no effect on a criterion of your own, which sees every group; weigh the "
            "groups in the function"
        )
    stats.check_finite()
    return scored_by(stats, criterion, name)


def checked_criterion(name: str) -> Criterion:
    """`criterion_named`, with an error of this package: PlanError."""
    from reap_kernels.errors import PlanError

    try:
        return criterion_named(name)
    except ValueError as error:
        raise PlanError(str(error)) from error


def random_values(sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Random scores, float64 [E] in [0, 1) for each layer; the same on every machine."""
    import torch

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
    from reap_kernels.errors import PlanError

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
    from reap_kernels.errors import DataError

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
    """What each group's sums are multiplied by, so that groups have these shares of the tokens.

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
    """Groups [..., G, E] added with one factor each [..., G], float64 [..., E]."""
    return (sums.double() * factors[..., None]).sum(dim=-2)


def family(sums: Tensor, rows: Tensor, b: float) -> Tensor:
    """n^-b * sum, for sums and numbers of rows [..., E]; 0 where there were no rows."""
    return (sums / rows**b).where(rows > 0, sums.new_zeros(()))
