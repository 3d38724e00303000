"""Criteria: from the statistics of a layer to one score per expert; higher scores are kept.

All but two belong to one family. With g the router weight and f the output of an expert, over the n
rows routed to it,

    S(b, alpha, p) = n^-b * sum g^alpha ||f||^p

so b = 1 takes a mean and b = 0 a sum. `reap` is S(1, 1, 1), equation 9 of the REAP paper
(arXiv 2510.13999). Any member whose sum is recorded can be named in this form: "S(0.5, 1, 1)". The
other two are `max_activation`, and `random` or `random:SEED`, a baseline that uses no statistics.
The score of an expert that no row was routed to is 0.

The module does not import torch, because `--help` lists the criteria.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    _Values = dict[str, Tensor]
else:
    _Values = dict


@dataclass(frozen=True)
class Criterion:
    """One way to score experts.

    Attributes:
        formula: for people to read.
        field: the recorded sum that it starts from (see `reap_kernels.LayerStats`). `out_max`
            stands for the largest absolute element, "" for random scores; neither is a sum.
        b: the sum is divided by the number of rows to this power: 1 for a mean, 0 for a sum.
        seed: of random scores.
    """

    formula: str
    field: str
    b: float = 0
    seed: int = 0

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of `reap_kernels.LayerStats` that it needs."""
        if self.field == "out_max":
            return ("out_max", "out_min")
        return (self.field,) if self.field else ()

    @property
    def is_sum(self) -> bool:
        """Whether it belongs to the family above: a function of sums over rows."""
        return self.field in RECORDED.values()


# (alpha, p) of the sums that are recorded -> the field that holds them.
RECORDED: dict[tuple[float, float], str] = {
    (0, 0): "count",
    (1, 0): "router_weight_sum",
    (0, 1): "norm_sum",
    (1, 1): "weighted_norm_sum",
    (0, 2): "norm_sq_sum",
    (2, 2): "weighted_norm_sq_sum",
}

CRITERIA: dict[str, Criterion] = {
    "reap": Criterion("mean g ||f||", "weighted_norm_sum", b=1),  # S(1, 1, 1), paper eq. 9
    "reap_l2": Criterion("mean (g ||f||)^2", "weighted_norm_sq_sum", b=1),  # S(1, 2, 2)
    "frequency": Criterion("n, rows routed", "count"),  # S(0, 0, 0)
    "weighted_frequency": Criterion("sum g", "router_weight_sum"),  # S(0, 1, 0)
    "ean_sum": Criterion("sum ||f||", "norm_sum"),  # S(0, 0, 1)
    "ean_mean": Criterion("mean ||f||", "norm_sum", b=1),  # S(1, 0, 1)
    "weighted_ean": Criterion("sum g ||f||", "weighted_norm_sum"),  # S(0, 1, 1)
    "msan": Criterion("mean ||f||^2", "norm_sq_sum", b=1),  # S(1, 0, 2)
    "max_activation": Criterion("largest |element of f|", "out_max"),
}

_NUMBER = r"\s*([0-9]*\.?[0-9]+)\s*"
_GENERIC = re.compile(rf"S\({_NUMBER},{_NUMBER},{_NUMBER}\)")
_RANDOM = re.compile(r"random(?::([0-9]{1,18}))?")


def criterion_named(name: str) -> Criterion:
    """The criterion called by a name of `CRITERIA`, `S(b,alpha,p)`, `random` or `random:SEED`.

    Raises:
        ValueError: there is no such criterion; the message lists those there are.

    Example:
        >>> criterion_named("S(1,1,1)").field == CRITERIA["reap"].field
        True
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
    """The criterion of this package that a name means; None for the name of a user's own."""
    try:
        return criterion_named(name)
    except ValueError:
        return None


def named(name: str) -> str:
    """The name of a criterion, with its formula if it is one of this package."""
    found = known_criterion(name)
    return name if found is None else f"{name}: {found.formula}"


def is_reserved(name: str) -> bool:
    """Whether a name belongs to this package, or has the form of one that would."""
    return name in CRITERIA or bool(_RANDOM.fullmatch(name) or _GENERIC.fullmatch(name))


class Scores(_Values):
    """Scores of every MoE layer, {layer name: float64 tensor [E]} on the CPU, and their provenance.

    Higher scores are kept. `reap_driver.score` makes them from statistics.

    Args:
        values: {layer name: float64 tensor [E]}.
        criterion: name of the criterion.
        weights: {calibration group: share of the tokens} that the scores were made for; None: as
            observed.
        provenance: `model`, `layers`, `data`, `observed`, `unobserved`, `notes` and `stacks`, as
            statistics have them; each is an attribute.

    Attributes:
        criterion, weights: as given.
        model: of the model: `id`, `config_digest` and others.
        layers: {layer name: facts}: `num_experts`, `top_k`, `n_group`, `topk_group` and others.
        data: of the calibration data, one entry per source.
        observed: on what and for how long the model was observed.
        unobserved: names of MoE layers that no token reached; they have no scores.
        notes: sentences that a plan made from the scores repeats.
        stacks: {field of config.json that counts experts: names of the layers it counts}, known
            only for models with unobserved layers.

    Example:
        >>> scores = rd.score(stats, "frequency")
        >>> scores.criterion, {len(values) for values in scores.values()}
        ('frequency', {32})
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
        self.observed: dict[str, Any] = dict(known.get("observed") or {})
        self.unobserved: list[str] = list(known.get("unobserved") or [])
        self.notes: list[str] = list(known.get("notes") or [])
        self.stacks: dict[str, list[str]] = dict(known.get("stacks") or {})

    def digest(self) -> str:
        """`sha256:...` of criterion, weights, layer names and all bits of the scores."""
        head = json.dumps([self.criterion, self.weights, list(self)], sort_keys=True)
        digest = hashlib.sha256(head.encode())
        for values in self.values():
            digest.update(values.cpu().contiguous().numpy().astype("<f8").tobytes())
        return "sha256:" + digest.hexdigest()


def checked_criterion(name: str) -> Criterion:
    """`criterion_named`, but raises PlanError."""
    from reap_kernels.errors import PlanError

    try:
        return criterion_named(name)
    except ValueError as error:
        raise PlanError(str(error)) from error
