"""What a plan does to a model's routing: read off statistics, and off the original as it runs."""

from collections.abc import Iterable, Mapping
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
from reap_driver.plan.plan import Plan
from reap_kernels import SaliencyStats
from reap_kernels.errors import PlanError, UnsupportedModel, UsageError


@dataclass(frozen=True)
class Retained:
    """What the experts that one layer keeps did in the original model.

    Attributes:
        gate_share: of the sum of combine weights, in [0, 1]; 1 where no token was routed.
        selection_share: of the slots (token, expert) that tokens were routed to.
        saliency_share: of the sum of g ||f||, which the `reap` criterion averages.
        dead_kept: ids of kept experts that no token reached.
        dead_removed: ids of removed experts that no token reached.
    """

    gate_share: float
    selection_share: float
    saliency_share: float
    dead_kept: tuple[int, ...]
    dead_removed: tuple[int, ...]


@dataclass(frozen=True)
class Orphans:
    """What the tokens of one layer lose.

    Attributes:
        tokens: counted tokens that are routed to any expert.
        orphaned: of these, the tokens whose first expert (of the largest combine weight; of equal
            ones, the router's first) is removed.
        stranded: of these, the tokens all of whose experts are removed.
        gate_share: mean over these of the share of a token's combine weight that lies on experts
            that stay; 1 without tokens.
    """

    tokens: int
    orphaned: int
    stranded: int
    gate_share: float

    @property
    def rate(self) -> float:
        """Share of orphaned tokens."""
        return self.orphaned / self.tokens if self.tokens else 0.0


@typed
def retained(stats: SaliencyStats, plan: "Plan") -> dict[str, Retained]:
    """How much of the routing observed in the original model goes to the experts a plan keeps.

    Args:
        stats: of the original model; all groups together.
        plan: of the same layers.

    Returns:
        Layer -> shares, for the layers of the plan that were observed, in the plan's order.

    Raises:
        PlanError: the plan counts other experts than the statistics, or has none of their layers.
    """
    found = {}
    for name, layer in plan.layers.items():
        if name not in stats.layers:
            continue
        total = stats.layers[name].total().to("cpu")
        _check_count(name, layer.num_experts, total.num_experts)
        kept = torch.tensor(layer.kept)
        count = total.count[0]
        found[name] = Retained(
            gate_share=_share(total.router_weight_sum[0], kept),
            selection_share=_share(count, kept),
            saliency_share=_share(total.weighted_norm_sum[0], kept),
            dead_kept=tuple(e for e in layer.kept if not count[e]),
            dead_removed=tuple(e for e in layer.removed if not count[e]),
        )
    if not found:
        raise PlanError(
            f"plan: has none of the {len(stats.layers)} layers of the statistics; use statistics "
            "of the model the plan was made for"
        )
    return found


@typed
def orphans(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], plan: "Plan"
) -> dict[str, Orphans]:
    """Runs the original model and counts the tokens whose first expert a plan removes.

    Args:
        model: the original, loaded, in eval mode.
        batches: what `observe` takes: `input_ids` [batch, seq] int64, perhaps `attention_mask` and
            `token_mask`.
        plan: made for this model.

    Returns:
        Layer -> counts, for every MoE layer of the model that the plan has.

    Raises:
        PlanError: see `RoutingObserver`.
        UnsupportedModel: see `RoutingObserver` and `observe`.
        DataError: see `observe`.
    """
    observer = RoutingObserver(model, plan)
    with observer:
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise UsageError(
                    f"orphans: batches holds a {type(batch).__name__}; give mappings of the "
                    "model's arguments, such as [{'input_ids': ids}]"
                )
            observer(**batch)
    return observer.orphans


class RoutingObserver(Observer):
    """An observer of the original model that also follows each token's routing under a plan.

    Used as `observe` is, resident or streamed. The largest of a token's combine weights says which
    expert is its first; slots with weight 0 and identity experts, which stay, are no loss. What it
    counts beside the statistics is in no snapshot, so a resumed run lacks what was before.

    Raises:
        PlanError: the plan has none of the model's layers, or counts other experts.
        UnsupportedModel: a layer shows its experts' gates without saying whose token they are, or
            has its experts on several ranks.
    """

    def __init__(self, model: PreTrainedModel, plan: "Plan", backend: str | None = None) -> None:
        super().__init__(model, backend)
        self._followed: dict[str, _RoutingRecorder] = {}
        for layer in self.layers:
            planned = plan.layers.get(layer.name)
            if planned is not None:
                _check_count(layer.name, planned.num_experts, layer.num_experts)
                self._followed[layer.name] = _RoutingRecorder(self, layer, planned.removed)
        if not self._followed:
            raise PlanError(
                f"plan: has none of the model's {len(self.layers)} MoE layers (first "
                f"{self.layers[0].name!r}); use the plan that was made for this model"
            )
        self._recorders |= self._followed

    @property
    def orphans(self) -> dict[str, Orphans]:
        """Layer -> what its tokens lose, so far, for the plan's layers."""
        return {name: recorder.orphans for name, recorder in self._followed.items()}


class _RoutingRecorder(LayerRecorder):
    """Statistics of one layer, and sums over its tokens of what a plan takes from them."""

    def __init__(self, observer: Observer, layer: MoELayer, removed: tuple[int, ...]) -> None:
        super().__init__(observer, layer)
        if layer.local is not None or not isinstance(adapter_of(layer), KernelAdapter):
            raise UnsupportedModel(
                f"{layer.name}: its block does not say which token goes to which expert (inline "
                "routing, or experts on several ranks), so orphans cannot be counted; load the "
                "model in one process, with a class that transformers ships"
            )
        self._removed = torch.zeros(layer.num_experts + 1, dtype=torch.bool)
        self._removed[list(removed)] = True  # the last entry: identity experts
        self._counts = torch.zeros(3, dtype=torch.int64)  # tokens, orphaned, stranded
        self._share = torch.zeros((), dtype=torch.float64)
        self._seen = 0  # the last forward that was counted, and what was counted before it
        self._earlier = self._counts, self._share

    def undo(self, forward: int) -> None:
        """Takes back what was counted in a forward, if it was the last."""
        super().undo(forward)
        if self._seen == forward:
            (self._counts, self._share), self._seen = self._earlier, 0

    def routed(self, ids: Tensor, weights: Tensor) -> None:
        """Adds the tokens of a call: ids and combine weights [T, k]."""
        if self._removed.device != ids.device:
            self._removed, self._counts, self._share = (
                t.to(ids.device) for t in (self._removed, self._counts, self._share)
            )
        if self._seen != self._observation.forwards:
            self._seen = self._observation.forwards
            self._earlier = self._counts, self._share
        experts = len(self._removed) - 1
        gates = weights.double()
        lost = self._removed[torch.where((ids >= 0) & (ids < experts), ids, experts).long()]
        any_lost = torch.where(gates != 0, lost, False)
        total = gates.sum(dim=1)
        counted = (gates != 0).any(dim=1)
        mask = self.token_mask(len(ids), ids.device)
        counted = counted if mask is None else counted & mask
        first = lost.gather(1, gates.argmax(dim=1, keepdim=True))[:, 0]
        all_lost = (any_lost | (gates == 0)).all(dim=1)
        share = torch.where(lost, 0, gates).sum(dim=1) / total
        flags = torch.stack([counted, counted & first, counted & all_lost])
        self._counts = self._counts + flags.sum(dim=1)
        self._share = self._share + torch.where(counted, share, 0).sum()

    @property
    def orphans(self) -> Orphans:
        """The counts on the host."""
        tokens, orphaned, stranded = self._counts.tolist()
        share = float(self._share) / tokens if tokens else 1.0
        return Orphans(tokens, orphaned, stranded, share)


def _check_count(name: str, planned: int, experts: int) -> None:
    """Raises PlanError unless the plan counts a layer's experts as they are."""
    if planned != experts:
        raise PlanError(
            f"plan: counts {planned} experts in {name!r}, the original has {experts}; use the plan "
            "that was made for this model"
        )


def _share(values: Tensor, kept: Tensor) -> float:
    """Share of a sum [E] that some entries hold; 1 of nothing."""
    total = float(values.sum())
    return float(values[kept].sum()) / total if total else 1.0
