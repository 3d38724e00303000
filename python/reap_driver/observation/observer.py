"""Observes a model: collects statistics of every expert while the model runs on calibration data.

The experts' forward is replaced by one that computes the same output and the statistics in one
pass, and is restored when the context exits. The model's outputs do not change.
"""

import contextlib
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.compat.mtp_layer import running_mtp
from reap_driver.compat.text_model import text_model
from reap_driver.fusing.fusion import Fused
from reap_driver.model.attention import Attention, AttentionKernels
from reap_driver.model.discover import adapter_of, block_of, find_moe_layers
from reap_driver.model.forward import forward
from reap_driver.model.unwrap import unwrap_model
from reap_driver.observation.copies import do_all
from reap_driver.observation.first_calls import FirstCalls
from reap_driver.observation.gram_sums import GramSink, check_gram
from reap_driver.observation.layer_recorder import LayerRecorder
from reap_driver.observation.provenance import provenance_of
from reap_driver.observation.token_mask import TokenMask
from reap_driver.observation.unchanged import check_unchanged
from reap_kernels import LayerGram, LayerStats, SaliencyStats
from reap_kernels.documents import as_read
from reap_kernels.errors import DataError, UnsupportedModel, UsageError
from reap_kernels.provenance import SOURCE
from reap_kernels.schema import check, short

DEFAULT_GROUP = "default"


# Expert modules that are being observed.
_OBSERVED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Observer:
    """The context that `observe()` returns; statistics accumulate over all forwards inside it.

    Attributes:
        model: the observed model, without wrappers.
        backend: the requested kernel backend; None for the best one for each call.
        gram: whether Gram matrices are summed.
        fused: what of the rest of the model kernels of fewer launches compute.
        layers: its MoE layers, in the model's order.
        groups: names of the calibration groups so far, in the order of their first use.

    Example:
        >>> with rd.observe(model) as observer:
        ...     with observer.group("code"):
        ...         observer(input_ids=ids)
        >>> observer.stats.groups
        ['code']
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backend: str | None = None,
        *,
        gram: bool = False,
        attention: Attention | None = None,
        fuse: bool | None = None,
    ) -> None:
        self.model = model = unwrap_model(model)
        self.backend, self.gram = backend, gram
        self.layers = find_moe_layers(model)
        self._attention = AttentionKernels(model, attention, self.layers[0].hidden_size)
        self.fused = Fused(model, fuse)
        if gram:
            check_gram(self.layers)
        self.groups: list[str] = []
        self.current = DEFAULT_GROUP
        self._reader = text_model(model)
        self.tokens = TokenMask(
            self._reader,
            [la.name for la in self.layers if not adapter_of(la).takes_mask],
            [la.name for la in self.layers if la.mtp],
        )
        self.first_calls = FirstCalls()
        self._recorders = {layer.name: LayerRecorder(self, layer) for layer in self.layers}
        self._sources: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._inside_group = False
        self._pending: str | None = None  # a group that was created but not entered
        self._thread: int | None = None  # the one that entered the context; None outside it
        self._running = self._complete = False
        self._groups_before = 0
        self.forwards = 0
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Observer":
        if self._thread is not None:
            raise UsageError("this observer is entered already; call it inside its one `with`")
        check_unchanged(self.model, self.layers, all_modules=True)
        modules = [layer.module for layer in self.layers]
        if any(module in _OBSERVED for module in modules):
            raise UnsupportedModel(
                "this model is being observed already; leave the first observe() before another"
            )
        with contextlib.ExitStack() as stack:
            _OBSERVED.update(modules)
            stack.callback(_OBSERVED.difference_update, modules)
            stack.enter_context(torch.no_grad())
            self.fused.bind(stack)
            handle = self._reader.register_forward_pre_hook(self._before_forward)
            stack.callback(handle.remove)
            for layer in self.layers:
                recorder = self._recorders[layer.name]
                block = block_of(self.model, layer)
                stack.enter_context(adapter_of(layer).bind(layer.module, block, recorder))
            stack.enter_context(running_mtp(self.model))  # first: it ends before the mask is gone
            stack.enter_context(self.tokens.hooked())
            handle = self._reader.register_forward_hook(self._after_forward)
            stack.callback(handle.remove)
            handle = self._reader.register_forward_hook(self._ended, always_call=True)
            stack.callback(handle.remove)
            self._exit = stack.pop_all()
        self._thread = threading.get_ident()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running:  # a BaseException such as KeyboardInterrupt ended the forward
            self._undo()
        self._thread = None
        self._exit.close()
        if kind is not None:
            self._notes.append(f"the observation was ended early by {kind.__name__}")

    def __call__(self, *args: Any, token_mask: Tensor | None = None, **batch: Any) -> Any:
        """Runs the model on one batch and returns its output.

        A forward that fails leaves the statistics unchanged.

        Args:
            token_mask: bool [batch, seq], tokens to count, such as answer tokens only; combined
                with `attention_mask` if both are given. Other tokens are computed, not counted.
            **batch: keyword arguments of the model's forward (`input_ids` [batch, seq] int64,
                ...), which are moved to its device. If `position_ids` [batch, seq] restart within
                a row, the row contains packed documents, which do not attend to each other.

        Returns:
            The model's output.

        Raises:
            UsageError: called outside the `with` block, or with positional arguments; or the model
                is inside `rd.fused` too.
            DataError: the batch is empty, a token id is outside the vocabulary, a mask does not
                fit, or the model does not take an argument.
            UnsupportedModel: a layer's output differs from the module's own; the batch has padding
                or packed documents and the model cannot handle them exactly; or the model changed
                inside the context (modules, dtype, training mode).
        """
        if self._thread is None:
            raise UsageError(
                "this observer is called outside its `with` block, where it records nothing; write "
                "`with rd.observe(model) as obs: obs(**batch)`"
            )
        if args:
            raise UsageError(
                f"an observer takes the model's arguments by name, not a {type(args[0]).__name__} "
                "alone; write obs(**batch), or obs(input_ids=ids)"
            )
        before = self.forwards
        try:
            attention = batch.get("attention_mask")
            with self.tokens.restricted_to(token_mask, attention), self._attention.around(batch):
                return forward(self.model, batch)
        except (Exception, KeyboardInterrupt):
            self._running = self.forwards != before  # also where a hook failed after all of ours
            self._undo()
            raise
        except BaseException:  # a streamed model aborts its forward after a layer, and it counts
            self._settle()
            raise
        finally:
            self._running = False

    def group(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context in which forwards are counted under the calibration group `name`.

        Raises:
            UsageError: the name is empty or not a string; or the context is inside that of another
                group, because a token counts under one group only.

        Example:
            >>> with rd.observe(model) as obs, obs.group("code"):
            ...     obs(**batch)
        """
        if not isinstance(name, str) or not name:
            raise UsageError(f"group {short(name)}: must be a non-empty string, such as 'code'")
        self._pending = name
        return self._grouped(name)

    @contextlib.contextmanager
    def _grouped(self, name: str) -> Iterator[None]:
        self._pending = None
        if self._inside_group and name != self.current:
            raise UsageError(
                f"group {name!r} is entered inside group {self.current!r}, but a token counts "
                "under one group only; exit the first group before"
            )
        before = self.current, self._inside_group
        self.current, self._inside_group = name, True
        try:
            yield
        finally:
            self.current, self._inside_group = before

    def add_source(self, source: dict[str, Any]) -> None:
        """Records the origin of calibration data in the provenance of the statistics.

        Raises:
            DataError: a field has a value that a statistics file cannot store.
        """
        try:
            check(as_read(source), SOURCE)
        except (ValueError, TypeError) as error:
            raise DataError(f"the source {short(source)} cannot be recorded: {error}") from error
        self._sources.append(source)

    def group_index(self) -> int:
        """Index of the current group, which is created on first use."""
        if self.current not in self.groups:
            self.groups.append(self.current)
        return self.groups.index(self.current)

    @property
    def stats(self) -> SaliencyStats:
        """Statistics of everything observed so far, on the CPU, with their provenance.

        Layers that no token reached, although others were reached (such as vision experts, with
        text), are left out and listed in `provenance["unobserved"]`, because they have no scores.
        In that case `provenance["stacks"]` lists the layers that share a config field for their
        number of experts.

        For an expert-parallel model this is a collective operation: every rank must read it, and
        gets the statistics of all experts. All ranks run the same tokens, which count once.

        Raises:
            DataError: an expert's output was NaN or Inf (names layer, group and count); or the
                ranks of an expert-parallel model ran different batches.
        """
        groups = self.groups or [DEFAULT_GROUP]
        collected = {
            name: recorder.collect(len(groups)) for name, recorder in self._recorders.items()
        }
        reached = {name for name, layer in collected.items() if int(layer.tokens.sum())}
        kept = {name: la for name, la in collected.items() if name in reached or not reached}
        self._check_finite(kept)
        return SaliencyStats(kept, list(groups), self._provenance(kept))

    @property
    def grams(self) -> dict[str, LayerGram]:
        """{layer: its Gram sums so far}, where they are, not copied; of layers that tokens reached.

        Empty without `gram=True`, and for layers that a streamed run has given to its sink.

        Raises:
            DataError: a forward failed after it had added to them, so they hold a part of it; or an
                expert's output was NaN or Inf.
        """
        self.check_finite()
        summed = {name: recorder.gram_so_far() for name, recorder in self._recorders.items()}
        return {
            name: sums
            for name, sums in summed.items()
            if sums is not None and self._recorders[name].reached
        }

    def give_grams(self, below: str, sink: GramSink) -> None:
        """Gives the Gram sums of the layers below a module to a sink; they are freed here.

        Args:
            below: qualified name of the module, such as a decoder layer's; its layers have run on
                all batches.
            sink: receives each layer.

        Raises:
            DataError: see `grams`.
        """
        groups = len(self.groups or [DEFAULT_GROUP])
        for name, recorder in self._recorders.items():
            if name.startswith(f"{below}.") and recorder.called:
                stats, sums = recorder.local(groups), recorder.take_gram()
                self._check_finite({name: stats})
                if sums is not None and recorder.reached:
                    sink(name, stats, sums, recorder.weights())

    def restore_grams(self, grams: Mapping[str, LayerGram]) -> None:
        """Continues from the sums of an earlier run, as `restore` does from its statistics."""
        for name, sums in grams.items():
            self._recorders[name].restore_gram(sums)

    def snapshot(self) -> SaliencyStats:
        """A copy, on the CPU, of the statistics of this process so far, for `restore`.

        Raises:
            DataError: an expert's output was NaN or Inf.
        """
        groups = self.groups or [DEFAULT_GROUP]
        called = {name: r for name, r in self._recorders.items() if r.called}
        layers = {name: recorder.local(len(groups)) for name, recorder in called.items()}
        served = {name: sorted(recorder.served_by) for name, recorder in called.items()}
        self._check_finite(layers)
        return SaliencyStats(layers, list(groups), {"served": served})

    def restore(self, snapshot: SaliencyStats) -> None:
        """Continues from a snapshot of an observation of the same model.

        Raises:
            DataError: the snapshot has a layer that the model does not have, or has with another
                number of experts.
        """
        served = snapshot.provenance.get("served", {})
        experts = {layer.name: layer.local_experts for layer in self.layers}
        for name, stats in snapshot.layers.items():
            if name not in served or experts.get(name) != stats.num_experts:
                raise DataError(
                    f"the snapshot has layer {name!r} with {stats.num_experts} experts, which this "
                    "model does not have; start again without it"
                )
        self.groups = list(snapshot.groups)
        for name, stats in snapshot.layers.items():
            self._recorders[name].restore(stats, served[name])

    def check_finite(self, below: str = "") -> None:
        """Raises DataError for the first layer whose experts in this process returned NaN or Inf.

        Later layers are not reported: their inputs are not finite because of it.

        Args:
            below: start of the names of the layers to check; by default all.
        """
        groups = len(self.groups or [DEFAULT_GROUP])
        called = {
            name: recorder
            for name, recorder in self._recorders.items()
            if recorder.called and name.startswith(below)
        }
        self._check_finite({name: recorder.local(groups) for name, recorder in called.items()})

    def _provenance(self, kept: Collection[str]) -> dict[str, Any]:
        """The provenance of the statistics of some layers."""
        served = (one.served_by for one in self._recorders.values() if one.called)
        facts = provenance_of(self.model, self.layers, kept, backends=set().union(*served))
        facts["data"] = [dict(source) for source in self._sources]
        if self._attention.used != "model":
            facts["attention"] = self._attention.used
        if self.fused.active:
            facts["fused"] = self.fused.counts
        return {**facts, "notes": list(self._notes)} if self._notes else facts

    def _check_finite(self, layers: Mapping[str, LayerStats]) -> None:
        groups = list(self.groups or [DEFAULT_GROUP])
        for name, layer in layers.items():
            if int(layer.nonfinite.sum()) and not self._recorders[name].input_finite:
                raise DataError(
                    f"layer {name}: the input of its experts was NaN or Inf, so what comes before "
                    "them in the model is at fault (embeddings, attention, norms, dense layers); "
                    "check the checkpoint's weights, or load it in a wider dtype"
                )
            SaliencyStats({name: layer}, groups).check_finite()

    @torch.compiler.disable
    def _before_forward(self, *_: Any) -> None:
        """Refuses a forward whose statistics would be wrong."""
        if self._running:
            self._undo()
        if threading.get_ident() != self._thread:
            raise UsageError(
                "the observed model is called from another thread than the one that entered its "
                "observer; groups and masks belong to one forward at a time: run batches in one "
                "thread, or give each its own model"
            )
        if self._pending is not None:
            raise UsageError(
                f"obs.group({self._pending!r}) was called, but not entered; write "
                f"`with obs.group({self._pending!r}):` around the forwards"
            )
        if torch.is_grad_enabled():
            raise UsageError(
                "gradients are enabled inside observe(), which computes none; remove "
                "torch.enable_grad(), or train outside of the context"
            )
        check_unchanged(self.model, self.layers)
        self.fused.check_alone()
        do_all([recorder.keep() for recorder in self._recorders.values()])
        self._running, self._complete, self._groups_before = True, False, len(self.groups)
        self.forwards += 1

    def _undo(self) -> None:
        """Removes what a failed forward has recorded."""
        if self._running:
            self.first_calls.drop()
            for recorder in self._recorders.values():
                recorder.undo(self.forwards)
            del self.groups[self._groups_before :]
        self._running = False

    def _settle(self) -> None:
        """Reads how the first calls of this forward compare; removes what it recorded if it raises.

        Raises:
            UnsupportedModel, DataError: see `FirstCalls.settle`.
        """
        try:
            self.first_calls.settle(self.check_finite)
        except BaseException:  # Ctrl-C too: reading waits for the device
            self._undo()
            raise

    @torch.compiler.disable
    def _ended(self, *_: Any) -> None:
        """Called after every forward; it failed if another's hook did, before `_after_forward`."""
        if not self._complete:
            self._undo()
        self._running = False

    @torch.compiler.disable
    def _after_forward(self, *_: Any) -> None:
        """Refuses a model that runs without calling any of the observed experts, or whose layers
        differ from their modules' own forwards.
        """
        if not any(recorder.called for recorder in self._recorders.values()):
            raise UnsupportedModel(
                f"{type(self.model).__name__} ran, but none of its {len(self.layers)} MoE layers "
                f"({self.layers[0].name}, ...) was called: something replaced their blocks; load "
                "the model without hub kernels (use_kernels) and without torch.compile"
            )
        self._settle()
        self._complete = True


@typed
def observe(
    model: PreTrainedModel,
    *,
    backend: str | None = None,
    gram: bool = False,
    attention: Attention | None = None,
    fuse: bool | None = None,
) -> Observer:
    """Collects statistics of every expert in all forwards of `model` inside the context.

    No gradients are computed inside it. The context may be entered again, which adds to the
    statistics. Under autocast, the experts compute in its dtype, as in the model's own forward.

    Args:
        model: a loaded MoE model in evaluation mode. If `torch.compile`, `DataParallel` or
            `DistributedDataParallel` wraps it, the wrapped model runs.
        backend: kernel backend, without fallback; None for the best one for each call.
        gram: also sum the Gram matrices that removing neurons needs, E * I^2 float32 per layer of
            E experts of width I; the observer's `grams` has them. Statistics stay the same bits.
        attention: "cudnn" to let torch try cuDNN's attention kernel first in calls of the observer,
            which needs a GPU of compute capability 9.0; "model" for the kernel that the model gets
            without; None for what the launch table says. A caller's own `sdpa_kernel` holds.
        fuse: whether `rms_norm` and `rotary` run where the model's own code computes what they do,
            see `fused`, which changes rounding; None for what the launch table has.

    Returns:
        The observer: call it with a batch to run the model, read `stats` for the statistics.

    Raises:
        UsageError: `model` is not a model.
        UnsupportedModel: see `find_moe_layers`; Gram matrices cannot be summed of a layer; or
            cuDNN's attention is asked for and the model does not use torch's function.
        BackendUnavailable: cuDNN's attention is asked for where it is not.

    Example:
        >>> with rd.observe(model) as obs:
        ...     obs(input_ids=ids)  # int64 [batch, seq]
        >>> scores = rd.score(obs.stats)
    """
    return Observer(model, backend, gram=gram, attention=attention, fuse=fuse)
