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


def checked_criterion(name: str) -> Criterion:
    """`criterion_named`, with an error of this package: PlanError."""
    from reap_kernels.errors import PlanError

    try:
        return criterion_named(name)
    except ValueError as error:
        raise PlanError(str(error)) from error
