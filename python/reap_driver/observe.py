"""Observe a model: run it on calibration batches and collect statistics of every expert.

The model computes what it always computes; the experts' function is swapped for one that yields the
same output and the statistics in one pass, and swapped back on exit whatever happens.
"""

import contextlib
import datetime
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import reap_kernels
from reap_driver.adapters import KernelAdapter
from reap_driver.compat.experts import Forward
from reap_driver.discover import MoELayer, adapter_of, block_of, find_moe_layers, record_of
from reap_driver.forward import forward
from reap_driver.masks import TokenMask
from reap_kernels import ExpertWeights, GateFormula, LayerStats, SaliencyStats, observe_layer
from reap_kernels.dispatch import Request, select
from reap_kernels.documents import as_read
from reap_kernels.errors import DataError, UnsupportedModel
from reap_kernels.experts.op import request_of
from reap_kernels.provenance import SOURCE
from reap_kernels.schema import check, short

DEFAULT_GROUP = "default"

# Tokens on which a layer's first call is compared with the module's own forward. Few: the check
# reads the weights of every expert they reach, which is most of its cost.
_SAMPLE = 4

# Largest accepted ||ours - eager|| / ||eager|| on the sample. Rounding explains a tenth of each; a
# dropped expert or a wrong gate gives more than 0.1.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}


class Observer:
    """The context `observe()` returns. Statistics accumulate over every forward inside it."""

    def __init__(self, model: PreTrainedModel, backend: str | None = None) -> None:
        self.model = model
        self.backend = backend
        self.layers = find_moe_layers(model)
        self.groups: list[str] = []
        self.current = DEFAULT_GROUP
        self.tokens = TokenMask(
            model, [la.name for la in self.layers if not adapter_of(la).takes_mask]
        )
        self._recorders = {layer.name: LayerRecorder(self, layer) for layer in self.layers}
        self._sources: list[dict[str, Any]] = []
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Observer":
        if self.model.training:
            raise UnsupportedModel(
                f"{type(self.model).__name__} is in training mode, where routers may add noise; "
                "call model.eval() first"
            )
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                recorder = self._recorders[layer.name]
                block = block_of(self.model, layer)
                stack.enter_context(adapter_of(layer).bind(layer.module, block, recorder))
            stack.enter_context(self.tokens.hooked())
            handle = self.model.register_forward_hook(self._after_forward)
            stack.callback(handle.remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def __call__(self, *, token_mask: Tensor | None = None, **batch: Any) -> Any:
        """Run the model on one batch and return its output.

        Args:
            token_mask: [batch, seq] bool, tokens to count (answer tokens only, say); combined with
                `attention_mask` if both are given. Tokens left out are computed, not counted.
            **batch: the model's own arguments (`input_ids` [batch, seq] int64, ...), moved to its
                device. `position_ids` [batch, seq] that begin anew inside a row are those of
                documents packed into it, which are kept apart.

        Raises:
            DataError: empty batch, a token id outside the vocabulary, masks that do not fit.
            UnsupportedModel: a layer's output differs from the module's own; or padding in a model
                whose own output changes with padding, or packed documents in one that cannot keep
                them apart.
        """
        with self.tokens.restricted_to(token_mask):
            return forward(self.model, batch)

    @contextlib.contextmanager
    def group(self, name: str) -> Iterator[None]:
        """Forwards inside the context are counted under the calibration group `name`."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def add_source(self, source: dict[str, Any]) -> None:
        """Record where calibration data came from, in the provenance of the statistics.

        Raises:
            DataError: a field has a value that statistics cannot keep.
        """
        try:
            check(as_read(source), SOURCE)
        except (ValueError, TypeError) as error:
            raise DataError(f"the source {short(source)} cannot be recorded: {error}") from error
        self._sources.append(source)

    def group_index(self) -> int:
        """Index of the current group, which exists from its first use."""
        if self.current not in self.groups:
            self.groups.append(self.current)
        return self.groups.index(self.current)

    @property
    def stats(self) -> SaliencyStats:
        """Statistics of everything observed so far, on the CPU, with their provenance.

        Layers that no token reached while others were reached (vision experts, on text) are left
        out and named under `provenance["unobserved"]`: they have no scores, good or bad.

        Of an expert-parallel model, all experts, on every rank; so every rank must read it, at the
        same point. Its ranks see the same tokens, which are not added up.

        Raises:
            DataError: an expert's output was NaN or Inf; names layer, group and count. Or the
                ranks of an expert-parallel model were given different batches.
        """
        groups = self.groups or [DEFAULT_GROUP]
        collected = {
            name: recorder.collect(len(groups)) for name, recorder in self._recorders.items()
        }
        reached = {name for name, layer in collected.items() if int(layer.tokens.sum())}
        kept = {name: la for name, la in collected.items() if name in reached or not reached}
        stats = SaliencyStats(kept, list(groups), self._provenance(list(kept)))
        stats.check_finite()
        return stats

    def snapshot(self) -> SaliencyStats:
        """A copy on the CPU of what this process observed so far, for `restore` to go on from.

        Raises:
            DataError: an expert's output was NaN or Inf.
        """
        groups = self.groups or [DEFAULT_GROUP]
        called = {name: r for name, r in self._recorders.items() if r.called}
        layers = {name: recorder.local(len(groups)) for name, recorder in called.items()}
        served = {name: sorted(recorder.served_by) for name, recorder in called.items()}
        stats = SaliencyStats(layers, list(groups), {"served": served})
        stats.check_finite()
        return stats

    def restore(self, snapshot: SaliencyStats) -> None:
        """Goes on from a snapshot of an observation of the same model, as if it had been made here.

        Raises:
            DataError: the snapshot has a layer that this model has not, or not so.
        """
        served = snapshot.provenance.get("served", {})
        experts = {layer.name: layer.local_experts for layer in self.layers}
        for name, stats in snapshot.layers.items():
            if name not in served or experts.get(name) != stats.num_experts:
                raise DataError(
                    f"a snapshot has layer {name!r} with {stats.num_experts} experts, which this "
                    "model has not; start anew"
                )
        self.groups = list(snapshot.groups)
        for name, stats in snapshot.layers.items():
            self._recorders[name].restore(stats, served[name])

    def _after_forward(self, *_: Any) -> None:
        """Refuse a model that runs without calling any of the experts we bound."""
        if not any(recorder.called for recorder in self._recorders.values()):
            raise UnsupportedModel(
                f"{type(self.model).__name__} ran, but none of its {len(self.layers)} MoE layers "
                f"({self.layers[0].name}, ...) was called: something replaced their block; load "
                "the model without hub kernels (use_kernels) and without torch.compile"
            )

    def _provenance(self, names: list[str]) -> dict[str, Any]:
        facts: dict[str, Any] = {
            **record_of(self.model, [layer for layer in self.layers if layer.name in names]),
            "data": [dict(source) for source in self._sources],
            "gate": "model",
            "software": {
                "reap_kernels": reap_kernels.__version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
            "backend": "+".join(
                sorted({name for r in self._recorders.values() if r.called for name in r.served_by})
            ),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        unobserved = [layer.name for layer in self.layers if layer.name not in names]
        return {**facts, "unobserved": unobserved} if unobserved else facts


class LayerRecorder:
    """Statistics of one layer during one observation, and the check of its first call."""

    def __init__(self, observer: Observer, layer: MoELayer) -> None:
        self._observer = observer
        self._layer = layer
        self._formula: GateFormula | None = None
        self._stats: LayerStats | None = None
        self._compared = False
        self._served: dict[int, str] = {}
        self._served_before: set[str] = set()  # the restored snapshot

    @property
    def called(self) -> bool:
        """Whether the layer has run."""
        return self._stats is not None

    @property
    def backend(self) -> str | None:
        """The kernel backend asked for."""
        return self._observer.backend

    @property
    def served_by(self) -> set[str]:
        """The backends that served this layer, which has run; they may differ by a call's size."""
        assert self._stats is not None
        if self._served or self._served_before:
            return {*self._served.values(), *self._served_before}
        # An adapter that brings the experts' outputs: only their statistics are a kernel's.
        dtype = next(self._layer.module.parameters()).dtype
        return {select(Request("saliency", self._stats.device, dtype), self.backend).name}

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self._layer.name

    @property
    def top_k(self) -> int:
        """Experts a token is routed to."""
        return self._layer.top_k

    def observe(self, hidden: Tensor, ids: Tensor, weights: Tensor, eager: Forward) -> Tensor:
        """Routed output [T, H] of one call, recorded; the first is compared with `eager`."""
        self.routed(ids, weights)
        mask = self.token_mask(len(hidden), hidden.device)
        experts = self.weights()
        stats, group = self.open(hidden.device)
        if len(hidden) not in self._served:
            request = request_of("layer", hidden, ids.shape[1], experts)
            self._served[len(hidden)] = select(request, self.backend).name
        out = observe_layer(
            hidden, ids, weights, experts, stats, mask=mask, group=group, backend=self.backend
        )
        rows = self.sample(len(hidden), self._comparable(ids, mask))
        if rows is not None:
            self.compare(out[rows], eager(hidden[rows], ids[rows], weights[rows]))
        return out

    def routed(self, ids: Tensor, weights: Tensor) -> None:
        """Nothing: statistics need no more than the experts' rows. Observers of routing ask."""

    def _comparable(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Counted tokens with an expert of this process: of others it computes nothing."""
        if self._compared or self._layer.local is None:
            return mask
        own = ((ids >= 0) & (ids < self._layer.local_experts)).any(dim=1)
        return own if mask is None else own & mask

    def weights(self) -> ExpertWeights:
        """The module's weights as they lie now."""
        module, adapter = self._layer.module, adapter_of(self._layer)
        if not isinstance(adapter, KernelAdapter):
            raise TypeError(f"adapter {adapter.name!r} does not describe its weights to kernels")
        if self._formula is None:
            self._formula = adapter.formula(module)
        return adapter.weights(module, self._formula)

    def token_mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """[tokens] bool on `device`; None when all count."""
        return self._observer.tokens.for_layer(self._layer.name, tokens, device)

    def open(self, device: torch.device) -> tuple[LayerStats, int]:
        """The layer's statistics on `device`, and the index of the current group."""
        group = self._observer.group_index()
        if self._stats is None:
            self._stats = LayerStats(self._layer.local_experts, len(self._observer.groups), device)
        elif self._stats.device != device:  # restored, so on the CPU
            self._stats = self._stats.to(device)
        self._stats.grow_groups(len(self._observer.groups))
        return self._stats, group

    def sample(self, tokens: int, mask: Tensor | None) -> Tensor | None:
        """Rows for the first call's comparison, spread over the counted tokens."""
        if self._compared:
            return None
        rows = torch.arange(tokens) if mask is None else mask.cpu().nonzero().flatten()
        if not len(rows):
            return None
        self._compared = True
        return rows[torch.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).long()]

    def compare(self, own: Tensor, eager: Tensor) -> None:
        """Raise unless our rows are the module's own, within the dtype's tolerance."""
        name, tolerance = self._layer.name, _TOLERANCE[own.dtype]
        truth = eager.double()
        if not bool(truth.isfinite().all()):
            bad = int((~truth.isfinite().all(dim=-1)).sum())
            raise DataError(
                f"{name}: the model's own experts give NaN or Inf for {bad} of {len(truth)} "
                f"tokens in {own.dtype}; check the checkpoint's weights, or load it in a wider "
                "dtype"
            )
        scale = float(truth.norm())
        error = float((own.double() - truth).norm()) / (scale or 1.0)
        if not error <= tolerance:
            raise UnsupportedModel(
                f"{name} ({type(self._layer.module).__name__}): our output differs from the "
                f"module's own by {error:.2e} relative, {tolerance:.0e} is allowed for "
                f"{own.dtype}; this model computes something this version does not know, so it is "
                "refused"
            )

    def collect(self, groups: int) -> LayerStats:
        """A copy on the CPU with `groups` groups, of all ranks' experts; empty if it never ran."""
        copy, local = self.local(groups), self._layer.local
        return copy if local is None else local.gathered(self.name, copy)

    def local(self, groups: int) -> LayerStats:
        """A copy on the CPU with `groups` groups, of this process's experts."""
        copy = LayerStats(self._layer.local_experts) if self._stats is None else self._stats
        copy = copy.to("cpu")
        copy.grow_groups(groups)
        return copy

    def restore(self, stats: LayerStats, served_by: Iterable[str]) -> None:
        """Goes on from these statistics, which those backends made."""
        self._stats = stats.to("cpu")
        self._served_before = set(served_by)


def observe(model: PreTrainedModel, *, backend: str | None = None) -> Observer:
    """Collect expert statistics of every forward of `model` inside the context.

    Args:
        model: a loaded MoE model in eval mode.
        backend: kernel backend, never falling back; default the best one for each call.

    Raises:
        UnsupportedModel: see `find_moe_layers`.
    """
    return Observer(model, backend)
