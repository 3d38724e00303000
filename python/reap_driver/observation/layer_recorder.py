"""Records the statistics of one layer, and checks its output against the module's own forward."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from reap_driver.compat.experts_interface import Forward, GroupedForm
from reap_driver.model.adapters import ExpertCall, KernelAdapter, Sample
from reap_driver.model.discover import MoELayer, adapter_of
from reap_driver.observation.copies import Copies
from reap_driver.observation.first_calls import Code, FirstCalls
from reap_driver.observation.token_mask import TokenMask
from reap_kernels import (
    Activation,
    ExpertWeights,
    LayerGram,
    LayerStats,
    check_backend,
    observe_layer,
)
from reap_kernels.dispatch import select
from reap_kernels.errors import DataError, UnsupportedModel
from reap_kernels.experts.request import request_of


class Observation(Protocol):
    """What a recorder needs from the observer that it belongs to.

    Attributes:
        backend: the requested kernel backend; None for the best one for each call.
        forwards: number of forwards that the model has started.
        groups: names of the calibration groups so far.
        tokens: the token mask of the current forward.
        gram: whether Gram matrices are summed.
        first_calls: the comparisons of layers' first calls.
    """

    backend: str | None
    gram: bool
    first_calls: FirstCalls
    forwards: int
    groups: list[str]
    tokens: TokenMask

    def group_index(self) -> int:
        """Index of the calibration group of the current forward."""
        ...


class LayerRecorder:
    """Statistics of one layer during one observation, and the check of its first call."""

    def __init__(self, observation: Observation, layer: MoELayer) -> None:
        self._observation = observation
        self._layer = layer
        self._activation: Activation | None = None
        self._stats: LayerStats | None = None
        self._dtype: torch.dtype | None = None  # in which the model computes the layer
        self._forward = 0  # the last one recorded; `_before` are the statistics before it
        self._before: LayerStats | None = None
        self._kept = True  # whether `_before` are the statistics now
        self._gram: LayerGram | None = None
        self._gram_lost = ""  # why it cannot be added to any more
        # Sums of the inputs, not finite if one is not: of forwards before, and of the last one.
        self._total: Tensor | None = None
        self._latest: Tensor | None = None
        self._served: dict[int, str] = {}
        self._served_before: set[str] = set()  # of the restored snapshot

    @property
    def called(self) -> bool:
        """Whether the layer has run."""
        return self._stats is not None

    @property
    def reached(self) -> bool:
        """Whether tokens that count have reached the layer."""
        return self._stats is not None and bool(self._stats.tokens.sum())

    @property
    def backend(self) -> str | None:
        """The kernel backend asked for."""
        return self._observation.backend

    @property
    def served_by(self) -> set[str]:
        """The backends that ran this layer, which was called; they may depend on a call's size."""
        assert self._stats is not None
        if self._served or self._served_before:
            return {*self._served.values(), *self._served_before}
        # The adapter computes the experts' outputs; a kernel computes only their statistics.
        dtype = next(self._layer.module.parameters()).dtype
        return {check_backend("saliency", self._stats.device, dtype, self.backend)}

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self._layer.name

    @property
    def top_k(self) -> int:
        """Experts a token is routed to."""
        return self._layer.top_k

    def observe(
        self,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        eager: Forward,
        grouped: Callable[[], GroupedForm | None] | None = None,
    ) -> Tensor:
        """The routed output [T, H] of one call, recorded; the first is compared, see `Recorder`."""
        self.routed(ids, weights)
        mask = self.token_mask(len(hidden), hidden.device)
        self.watch(weights, mask)  # smaller than the rows, and not finite if a row is not
        rows, experts = self.operands(hidden)
        stats, group = self.open(hidden.device)
        if len(hidden) not in self._served:
            gram = self._observation.gram
            request = request_of("layer", rows, ids.shape[1], experts, gram=gram)
            self._served[len(hidden)] = select(request, self.backend).name
        out = observe_layer(
            rows,
            ids,
            weights,
            experts,
            stats,
            mask=mask,
            group=group,
            backend=self.backend,
            gram=self.gram(hidden.device),
        ).to(hidden.dtype)
        if self._observation.first_calls.due(self.name):
            self._compare_first(ExpertCall(hidden, ids, weights, mask), out, eager, grouped)
        return self.computed(ExpertCall(rows, ids, weights, mask), out)

    def computed(self, call: ExpertCall, out: Tensor) -> Tensor:
        """Called with every call and its output, whose place the result takes. A hook for
        subclasses.
        """
        return out

    def routed(self, ids: Tensor, weights: Tensor) -> None:
        """Called with the routing of every call. A hook for subclasses that record the routing."""

    def _compare_first(
        self,
        call: ExpertCall,
        out: Tensor,
        eager: Forward,
        grouped: Callable[[], GroupedForm | None] | None,
    ) -> None:
        """Compares the output [T, H] of a call with the module's own on a sample of its tokens."""
        mask = self._comparable(call.ids, call.mask)
        sample = self.sample(len(out), mask, out.device)
        if sample is None:
            return
        few = sample.rows
        operands = call.hidden[few], call.ids[few], call.weights[few]
        own, code = self._own_output(operands, eager, grouped)
        self.compare(sample, out[few], own, code)

    def _own_output(
        self,
        operands: tuple[Tensor, Tensor, Tensor],
        eager: Forward,
        grouped: Callable[[], GroupedForm | None] | None,
    ) -> tuple[Tensor, Code]:
        """What the module computes of some tokens, and by which code."""
        forward, code = self._observation.first_calls.reference(eager, grouped)
        try:
            return forward(*operands), code
        except torch.OutOfMemoryError:  # a RuntimeError too, with another remedy
            raise
        except RuntimeError as error:
            if not code.own:  # torch has no grouped product for these weights on this device
                return self._own_output(operands, eager, None)
            raise UnsupportedModel(
                f"{self.name}: the module's own forward fails, so the observed output cannot be "
                f"checked ({str(error).splitlines()[0]}); run the model without observe(), and "
                "without autocast"
            ) from error

    def _comparable(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Mask of counted tokens that reach an expert of this process; it computes no others."""
        if self._layer.local is None:
            return mask
        own = ((ids >= 0) & (ids < self._layer.local_experts)).any(dim=1)
        return own if mask is None else own & mask

    def operands(self, hidden: Tensor) -> tuple[Tensor, ExpertWeights]:
        """The input and the module's current weights, in the dtype that the model computes in."""
        experts = self.weights()
        dtype = _computed_dtype(experts.dtype, hidden.device)
        if dtype == experts.dtype:
            return hidden, experts
        return hidden.to(dtype), _cast(experts, dtype)

    def weights(self) -> ExpertWeights:
        """The module's weights where they are now, as views."""
        module, adapter = self._layer.module, adapter_of(self._layer)
        if not isinstance(adapter, KernelAdapter):
            raise TypeError(f"adapter {adapter.name!r} does not describe its weights to kernels")
        if self._activation is None:
            self._activation = self._observation.first_calls.activation(module, adapter)
        return adapter.weights(module, self._activation)

    def token_mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """The token mask, bool [tokens] on `device`; None if all tokens count."""
        return self._observation.tokens.for_layer(self._layer.name, tokens, device)

    def open(self, device: torch.device) -> tuple[LayerStats, int]:
        """The layer's statistics on `device`, and the index of the current group."""
        self._check_dtype(device)
        if self._forward != self._observation.forwards:
            self._forward, self._kept = self._observation.forwards, False
        group = self._observation.group_index()
        if self._stats is None:
            self._stats = LayerStats(
                self._layer.local_experts, len(self._observation.groups), device
            )
        elif self._stats.device != device:  # restored, so on the CPU
            self._stats = self._stats.to(device)
        self._stats.grow_groups(len(self._observation.groups))
        return self._stats, group

    def gram(self, device: torch.device) -> LayerGram | None:
        """The layer's Gram sums on `device`, to add to; None where none are asked for.

        Raises:
            DataError: a forward failed that had added to them, or they were taken already.
        """
        if not self._observation.gram:
            return None
        if self._gram_lost:
            raise DataError(
                f"{self.name}: {self._gram_lost}; observe anew, or without Gram matrices"
            )
        if self._gram is None:
            width = self._layer.intermediate_size
            self._gram = LayerGram(self._layer.local_experts, width, device)
        elif self._gram.device != device:  # restored, so on the CPU
            self._gram = self._gram.to(device)
        return self._gram

    def gram_so_far(self) -> LayerGram | None:
        """The layer's Gram sums where they are; None if there are none.

        Raises:
            DataError: see `gram`.
        """
        return None if self._gram is None else self.gram(self._gram.device)

    def take_gram(self) -> LayerGram | None:
        """The same, which the layer then lets go of: it cannot run again."""
        taken = self.gram_so_far()
        if taken is not None:
            self._gram, self._gram_lost = None, "runs again after its Gram matrices were taken"
        return taken

    def restore_gram(self, sums: LayerGram) -> None:
        """Continues from these sums."""
        self._gram = sums

    def watch(self, rows: Tensor, mask: Tensor | None) -> None:
        """Records whether the input of the experts is finite for all counted tokens.

        Args:
            rows: [T, n], the experts' input, or what the router computed from it.
            mask: bool [T]; None if all tokens count.
        """
        counted = rows if mask is None else torch.where(mask[:, None], rows, 0)
        # Propagates NaN and Inf, without waiting for the device.
        total = counted.sum(dtype=torch.float32)
        self._latest = total if self._latest is None else self._latest.to(total.device) + total

    def keep(self) -> Copies:
        """Keeps the statistics for `undo`; called before every forward.

        Returns:
            What remains to be copied and added; `do_all` does it for all layers together.
        """
        stats, before, left = self._stats, self._before, Copies()
        if self._kept or stats is None:
            return left
        self._kept = True
        if before is not None and _alike(before.counts, stats.counts):
            left.copied += zip(before.packed(), stats.packed(), strict=True)
        else:
            self._before = stats.to(stats.device)
        total, latest = self._total, self._latest
        if total is not None and latest is not None and _alike(total, latest):
            left.added.append((total, latest))
        elif latest is not None:
            self._total = latest if total is None else total.to(latest.device) + latest
        self._latest = None
        return left

    @property
    def input_finite(self) -> bool:
        """Whether the input was finite for all counted tokens so far."""
        sums = (self._total, self._latest)
        return all(one is None or bool(one.isfinite()) for one in sums)

    def undo(self, forward: int) -> None:
        """Removes what was recorded in a forward, if it is the last one recorded."""
        if self._forward == forward:
            if self._before is None:
                self._gram = None
            elif self._gram is not None:  # a copy before every forward would cost as much again
                self._gram_lost = "a forward failed after it had added to the Gram matrices"
            self._stats, self._forward = self._before, 0
            self._before, self._kept, self._latest = None, False, None
            self._dtype = None if self._stats is None else self._dtype

    def _check_dtype(self, device: torch.device) -> None:
        """Raises UnsupportedModel if the layer computes in another dtype than before."""
        stored = next(self._layer.module.parameters()).dtype
        dtype = _computed_dtype(stored, device)
        if self._dtype not in (None, dtype):
            raise UnsupportedModel(
                f"{self.name} was observed in {self._dtype} and computes in {dtype} now, but "
                "statistics of two precisions cannot be added; change the model's dtype, or enter "
                "autocast, before observing"
            )
        self._dtype = dtype

    def sample(self, tokens: int, mask: Tensor | None, device: torch.device) -> Sample | None:
        """The tokens to compare in the first call with counted tokens; None afterwards."""
        return self._observation.first_calls.sample(self.name, tokens, mask, device)

    def compare(self, sample: Sample, ours: Tensor, own: Tensor, code: Code | None = None) -> None:
        """Compares our output of some tokens with the module's own, which `code` computed, by
        default that of its class. The result is read after the forward.
        """
        dtype = ours.dtype if self._dtype is None else self._dtype
        first_calls = self._observation.first_calls
        first_calls.add(self._layer, dtype, sample, code or Code(), ours, own)

    def collect(self, groups: int) -> LayerStats:
        """A copy on the CPU with `groups` groups, of all ranks' experts; empty if never called."""
        copy, local = self.local(groups), self._layer.local
        return copy if local is None else local.gathered(self.name, copy)

    def local(self, groups: int) -> LayerStats:
        """A copy on the CPU with `groups` groups, of this process's experts."""
        copy = LayerStats(self._layer.local_experts) if self._stats is None else self._stats
        copy = copy.to("cpu")
        copy.grow_groups(groups)
        return copy

    def restore(self, stats: LayerStats, served_by: Iterable[str]) -> None:
        """Continues from these statistics, which the given backends computed."""
        self._stats, self._kept = stats.to("cpu"), False
        self._served_before = set(served_by)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have one shape and device."""
    return one.shape == other.shape and one.device == other.device


def _computed_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix products with weights of a dtype: that of autocast, inside it."""
    if stored == torch.float64 or not torch.is_autocast_enabled(device.type):
        return stored
    return torch.get_autocast_dtype(device.type)


def _cast(experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """The same weights in another dtype."""
    names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    known = {name: value for name in names if (value := getattr(experts, name)) is not None}
    cast: dict[str, Any] = {
        name: value.to(dtype) if isinstance(value, Tensor) else [v.to(dtype) for v in value]
        for name, value in known.items()
    }
    return dataclasses.replace(experts, **cast)
