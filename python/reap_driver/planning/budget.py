"""How many experts one layer can lose and does lose, and which of them it keeps."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reap_kernels.errors import PlanError
from reap_kernels.provenance import LAYER
from reap_kernels.schema import Mismatch, check

# A product such as 100 * 0.29 falls short of the integer it means by less than this.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Router:
    """The shape of one layer's router.

    Attributes:
        name: the layer.
        num_experts: E.
        top_k: experts a token is routed to.
        n_group: routing groups, consecutive runs of E / n_group ids; 1 where the router has none.
        topk_group: groups a token's experts are chosen from.
    """

    name: str
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int

    @classmethod
    def of(cls, name: str, layer: Mapping[str, Any]) -> "Router":
        """From `num_experts`, `top_k` and, where there are groups, `n_group` and `topk_group`.

        Raises:
            PlanError: a number is not recorded or not possible, or the experts do not divide into
                the groups.
        """
        try:
            check(layer, LAYER)
            experts, top_k = layer["num_experts"], layer["top_k"]
        except (KeyError, Mismatch) as error:
            what = f"do not record {error}" if isinstance(error, KeyError) else f"say: {error}"
            raise PlanError(
                f"layer {name}: the statistics {what}; observe with reap-kernels, or say how it "
                f'routes: provenance["layers"]["{name}"] = {{"num_experts": 64, "top_k": 8}}'
            ) from error
        n_group, topk_group = layer.get("n_group") or 1, layer.get("topk_group") or 1
        if experts % n_group:
            raise PlanError(
                f"layer {name}: {experts} experts do not divide into {n_group} routing groups; "
                "correct n_group of the model's config.json"
            )
        if top_k > experts or topk_group > n_group:
            raise PlanError(
                f"layer {name}: a token is routed to {top_k} of {experts} experts in {topk_group} "
                f"of {n_group} groups, says its provenance; observe again"
            )
        return cls(name, experts, top_k, n_group, topk_group)

    @property
    def group_size(self) -> int:
        """Experts in a routing group."""
        return self.num_experts // self.n_group

    def most(self, protected: Collection[int] = ()) -> int:
        """The largest number of experts that can be removed, a multiple of `n_group`; perhaps 0.

        A router without groups needs top_k experts. A router with groups scores a group by its two
        best experts, so each group keeps two if it has two, and the topk_group groups that are
        chosen must hold top_k experts. Protected experts are always kept, and every group keeps as
        many experts as the group with the most protected ones.
        """
        needed = self.top_k
        if self.n_group > 1:
            needed = max(min(2, self.group_size), -(-self.top_k // self.topk_group))
        held = [0] * self.n_group
        for expert in protected:
            held[expert // self.group_size] += 1
        return max(0, self.group_size - max(needed, *held)) * self.n_group

    def losing(self, removed: int, protected: frozenset[int], asked: int | None = None) -> "Budget":
        """The budget that removes a number of experts; `asked` if another number was asked for."""
        wanted = removed if asked is None else asked
        most = self.most(protected)
        return Budget(self.name, self.num_experts, removed, wanted, most, self.n_group, protected)


@dataclass(frozen=True)
class Budget:
    """How many experts one layer loses, and the shape of its router.

    Attributes:
        name: the layer.
        num_experts: E.
        removed: experts to remove, a multiple of `n_group`.
        asked: what the ratio asked for; more than `removed` where groups made it round down.
        most: the largest number that could be removed.
        n_group: routing groups, consecutive runs of E / n_group ids; 1 where the router has none.
        protected: experts that are kept whatever their scores.
    """

    name: str
    num_experts: int
    removed: int
    asked: int
    most: int
    n_group: int
    protected: frozenset[int] = frozenset()

    @property
    def kept(self) -> int:
        """How many experts are kept."""
        return self.num_experts - self.removed


def check_ratio(ratio: float) -> None:
    """Raises PlanError unless 0 < ratio < 1."""
    if not 0 < ratio < 1:  # NaN ends here too
        raise PlanError(
            f"ratio {ratio:g} is not the share of experts to remove; give a number above 0 and "
            "below 1, such as 0.5"
        )


def floor_of(experts: int, ratio: float) -> int:
    """floor(experts * ratio), as published checkpoints count: 288 experts at 40 % keep 173."""
    return math.floor(experts * ratio + _ROUNDING)


def ratio_of(removed: int, experts: int) -> float:
    """The ratio, rounded up to four decimals, that removes exactly this number of experts."""
    return math.ceil(removed / experts * 1e4 - _ROUNDING) / 1e4


def nearest(possible: Iterable[int], number: int) -> list[int]:
    """The nearest of some numbers below and above another one, as far as there are any."""
    known = sorted(possible)
    return [n for n in known if n < number][-1:] + [n for n in known if n > number][:1]


def refusal(router: Router, removed: int, protected: Collection[int]) -> str | None:
    """Why a layer cannot lose this number of experts; None if it can."""
    if removed <= router.most(protected):
        return None
    left = f"leaves {router.num_experts - removed}"
    if removed <= router.most():
        return f"{left}, but {len(protected)} of its experts are protected"
    grouped = f" from {router.topk_group} of {router.n_group} groups" if router.n_group > 1 else ""
    return f"{left}, but the router chooses {router.top_k} experts{grouped}"


def kept_experts(scores: Tensor, budget: Budget) -> tuple[int, ...]:
    """The ids that are kept, ascending: the highest scores of the layer or of each routing group.

    Args:
        scores: float64 [E].
        budget: of this layer.

    Raises:
        PlanError: the scores are of another number of experts.
    """
    if tuple(scores.shape) != (budget.num_experts,):
        raise PlanError(
            f"layer {budget.name}: scores have shape {tuple(scores.shape)}, expected "
            f"({budget.num_experts},); score statistics of this model"
        )
    size = budget.num_experts // budget.n_group
    keep = size - budget.removed // budget.n_group
    best = ranked(scores, budget.n_group, budget.protected)[:, :keep]
    return tuple(
        group * size + index for group, row in enumerate(best.tolist()) for index in sorted(row)
    )


def ranked(scores: Tensor, n_group: int, protected: Collection[int] = ()) -> Tensor:
    """Experts of each routing group, highest score first.

    Args:
        scores: [..., E].
        n_group: routing groups of the layer.
        protected: come before all others.

    Returns:
        int64 [..., n_group, E / n_group], positions within the group.
    """
    if protected:
        scores = scores.clone()
        scores[..., sorted(protected)] = math.inf
    grouped = scores.unflatten(-1, (n_group, -1))
    # Stable: of equal scores the lower index comes first, and is kept.
    return grouped.sort(dim=-1, descending=True, stable=True).indices
