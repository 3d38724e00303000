"""What a plan does to a model's routing, by running the original model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.model.adapters import KernelAdapter
from reap_driver.model.discover import MoELayer, adapter_of
from reap_driver.observation.layer_recorder import LayerRecorder
from reap_driver.observation.observer import Observer
from reap_driver.planning.plan import Plan
from reap_driver.planning.retained import check_count
from reap_kernels.errors import PlanError, UnsupportedModel, UsageError


@dataclass(frozen=True)
class Orphans:
    """What the tokens of one layer lose.

    Attributes:
        tokens: number of counted tokens that are routed to any expert.
        orphaned: how many of them lose their first expert (with the largest router weight; among
            equal weights, the first in the router's order).
        stranded: how many of them lose all their experts.
        router_weight_share: mean over these tokens of the share of a token's router weight on kept
            experts, in [0, 1]; 1 without tokens.
    """

    tokens: int
    orphaned: int
    stranded: int
    router_weight_share: float

    @property
    def rate(self) -> float:
        """Share of orphaned tokens, in [0, 1]."""
        return self.orphaned / self.tokens if self.tokens else 0.0


@typed
def orphans(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], plan: "Plan"
) -> dict[str, Orphans]:
    """Runs the original model and counts the tokens whose first expert a plan removes.

    Args:
        model: the original model, loaded, in eval mode.
        batches: the model's arguments for each batch: `input_ids` int64 [batch, seq], and
            optionally `attention_mask` and `token_mask` (bool), both [batch, seq].
        plan: a plan for this model.

    Returns:
        Layer -> counts, for every MoE layer that the plan names. Each has `tokens`, `orphaned`,
        `stranded`, and `rate` and `router_weight_share` in [0, 1].

    Raises:
        PlanError: the plan names none of the model's layers, or another number of experts.
        UnsupportedModel: a layer does not show which token goes to which expert, or see `observe`.
        DataError: a batch that `observe` refuses.
        UsageError: a batch is not a mapping.

    Example:
        >>> found = rd.orphans(model, batches, plan)
        >>> list(found) == list(plan.layers)
        True
    """
    [found] = orphans_of_each(model, batches, [plan])
    return found


def orphans_of_each(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], plans: Sequence[Plan]
) -> list[dict[str, Orphans]]:
    """`orphans` of several plans, for which the model runs once."""
    observer = RoutingObserver(model, plans)
    with observer:
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise UsageError(
                    f"orphans: batches holds a {type(batch).__name__}; give mappings of the "
                    "model's arguments, such as [{'input_ids': ids}]"
                )
            observer(**batch)
    return observer.of_each


class RoutingObserver(Observer):
    """An observer of the original model that also counts what each token loses under plans.

    It is used like `observe`, resident or streamed. A token's first expert is the one with the
    largest router weight. Slots with weight 0 count as no loss, nor do identity experts, which are
    always kept. These counts are not part of snapshots, so a resumed run would start them at 0.

    Raises:
        PlanError: the plan names none of the model's layers, or another number of experts.
        UnsupportedModel: a layer does not show which token goes to which expert, or has its experts
            on several ranks.
    """

    def __init__(
        self, model: PreTrainedModel, plans: Plan | Sequence[Plan], backend: str | None = None
    ) -> None:
        super().__init__(model, backend)
        plans = [plans] if isinstance(plans, Plan) else plans
        self._plans = len(plans)
        self._followed: dict[str, _RoutingRecorder] = {}
        for layer in self.layers:
            removed = {}
            for number, plan in enumerate(plans):
                if (planned := plan.layers.get(layer.name)) is not None:
                    check_count(layer.name, planned.num_experts, layer.num_experts)
                    removed[number] = planned.removed
            if removed:
                self._followed[layer.name] = _RoutingRecorder(self, layer, removed)
        if any(not found for found in self.of_each):
            raise PlanError(
                f"plan: names none of the model's {len(self.layers)} MoE layers (first "
                f"{self.layers[0].name!r}); use the plan that was made for this model"
            )
        self._recorders |= self._followed

    @property
    def orphans(self) -> dict[str, Orphans]:
        """Layer -> what its tokens have lost so far under the first plan, for its layers."""
        return self.of_each[0]

    @property
    def of_each(self) -> list[dict[str, Orphans]]:
        """The same for each plan."""
        found: list[dict[str, Orphans]] = [{} for _ in range(self._plans)]
        for name, recorder in self._followed.items():
            for number, lost in recorder.orphans.items():
                found[number][name] = lost
        return found


class _RoutingRecorder(LayerRecorder):
    """Statistics of one layer, and counts of what its tokens lose under P plans that name it.

    Args:
        removed: number of a plan -> ids that it removes from the layer.
    """

    def __init__(
        self, observer: Observer, layer: MoELayer, removed: Mapping[int, Sequence[int]]
    ) -> None:
        super().__init__(observer, layer)
        if layer.local is not None or not isinstance(adapter_of(layer), KernelAdapter):
            raise UnsupportedModel(
                f"{layer.name}: its block does not show which token goes to which expert (inline "
                "routing, or experts on several ranks), so orphans cannot be counted; load the "
                "model in one process, with a class that transformers ships"
            )
        self._numbers = list(removed)
        # [P, E + 1]; the last entry is for identity experts, which are never removed.
        self._removed = torch.zeros(len(removed), layer.num_experts + 1, dtype=torch.bool)
        for row, ids in zip(self._removed, removed.values(), strict=True):
            row[list(ids)] = True
        # [P, 3]: tokens, orphaned, stranded.
        self._counts = torch.zeros(len(removed), 3, dtype=torch.int64)
        self._share = torch.zeros(len(removed), dtype=torch.float64)
        self._seen = 0  # the last forward that was counted, and the counts before it
        self._earlier = self._counts, self._share

    def undo(self, forward: int) -> None:
        """Takes back the counts of a forward, if it was the last one counted."""
        super().undo(forward)
        if self._seen == forward:
            (self._counts, self._share), self._seen = self._earlier, 0

    def routed(self, ids: Tensor, weights: Tensor) -> None:
        """Adds the tokens of a call: ids int64 [T, k] and router weights [T, k]."""
        if self._removed.device != ids.device:
            self._removed, self._counts, self._share = (
                t.to(ids.device) for t in (self._removed, self._counts, self._share)
            )
        if self._seen != self._observation.forwards:
            self._seen = self._observation.forwards
            self._earlier = self._counts, self._share
        experts = self._removed.shape[1] - 1
        weights = weights.double()
        counted = (weights != 0).any(dim=1)
        mask = self.token_mask(len(ids), ids.device)
        counted = counted if mask is None else counted & mask
        first = weights.argmax(dim=1, keepdim=True)
        total = weights.sum(dim=1)
        known = torch.where((ids >= 0) & (ids < experts), ids, experts).long()
        flags, shares = [], []
        for removed in self._removed:  # one plan at a time, so that memory holds one [T, k]
            lost = removed[known]
            all_lost = (lost | (weights == 0)).all(dim=1)
            share = torch.where(lost, 0, weights).sum(dim=1) / total
            shares.append(torch.where(counted, share, 0).sum())
            orphaned = counted & lost.gather(1, first)[:, 0]
            flags.append(torch.stack([counted, orphaned, counted & all_lost]).sum(dim=1))
        self._counts = self._counts + torch.stack(flags)
        self._share = self._share + torch.stack(shares)

    @property
    def orphans(self) -> dict[int, Orphans]:
        """Number of a plan -> the counts, as Python numbers."""
        found = {}
        for number, counts, share in zip(self._numbers, self._counts, self._share, strict=True):
            tokens, orphaned, stranded = counts.tolist()
            found[number] = Orphans(
                tokens, orphaned, stranded, float(share) / tokens if tokens else 1.0
            )
        return found
