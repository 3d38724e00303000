"""Observe a model: run it on calibration batches and collect statistics of every expert.

The model computes what it always computes; the experts' function is swapped for one that yields the
same output and the statistics in one pass, and swapped back on exit whatever happens.
"""

import contextlib
import datetime
import threading
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import reap_kernels
from reap_driver.base.arguments import typed
from reap_driver.compat.text_model import text_model
from reap_driver.model.discover import adapter_of, block_of, find_moe_layers, record_of
from reap_driver.model.expert_dims import stacks_of
from reap_driver.model.forward import forward
from reap_driver.model.unwrap import check_mode, unwrap_model
from reap_driver.observation.layer_recorder import LayerRecorder
from reap_driver.observation.token_mask import TokenMask
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.documents import as_read
from reap_kernels.errors import DataError, UnsupportedModel, UsageError
from reap_kernels.provenance import SOURCE
from reap_kernels.schema import check, short

DEFAULT_GROUP = "default"


# Experts modules that an observer counts the tokens of.
_OBSERVED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Observer:
    """The context `observe()` returns. Statistics accumulate over every forward inside it."""

    def __init__(self, model: PreTrainedModel, backend: str | None = None) -> None:
        self.model = model = unwrap_model(model)
        self.backend = backend
        self.layers = find_moe_layers(model)
        self.groups: list[str] = []
        self.current = DEFAULT_GROUP
        self._reader = text_model(model)
        self.tokens = TokenMask(
            self._reader, [la.name for la in self.layers if not adapter_of(la).takes_mask]
        )
        self._recorders = {layer.name: LayerRecorder(self, layer) for layer in self.layers}
        self._sources: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._inside_group = False
        self._pending: str | None = None  # a group that was named and not entered
        self._thread: int | None = None  # that entered the context; None outside it
        self._running = False
        self._groups_before = 0
        self.forwards = 0
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Observer":
        if self._thread is not None:
            raise UsageError("this observer is entered already; call it inside its one `with`")
        self._check_model(all_modules=True)
        modules = [layer.module for layer in self.layers]
        if any(module in _OBSERVED for module in modules):
            raise UnsupportedModel(
                "this model is being observed already; leave the first observe() before another"
            )
        with contextlib.ExitStack() as stack:
            _OBSERVED.update(modules)
            stack.callback(_OBSERVED.difference_update, modules)
            stack.enter_context(torch.no_grad())
            handle = self._reader.register_forward_pre_hook(self._before_forward)
            stack.callback(handle.remove)
            for layer in self.layers:
                recorder = self._recorders[layer.name]
                block = block_of(self.model, layer)
                stack.enter_context(adapter_of(layer).bind(layer.module, block, recorder))
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
        if self._running:  # the forward was left by what is no Exception, such as Ctrl-C
            self._undo()
        self._thread = None
        self._exit.close()
        if kind is not None:
            self._notes.append(f"the observation was ended early by {kind.__name__}")

    def __call__(self, *args: Any, token_mask: Tensor | None = None, **batch: Any) -> Any:
        """Run the model on one batch and return its output. A forward that fails counts nothing.

        Args:
            token_mask: [batch, seq] bool, tokens to count (answer tokens only, say); combined with
                `attention_mask` if both are given. Tokens left out are computed, not counted.
            **batch: the model's own arguments (`input_ids` [batch, seq] int64, ...), moved to its
                device. `position_ids` [batch, seq] that begin anew inside a row are those of
                documents packed into it, which are kept apart.

        Raises:
            UsageError: outside the `with` block, where nothing would be counted; or arguments
                without names.
            DataError: empty batch, a token id outside the vocabulary, masks that do not fit, an
                argument that the model does not have.
            UnsupportedModel: a layer's output differs from the module's own; or padding in a model
                whose own output changes with padding, or packed documents in one that cannot keep
                them apart; or the model is not the one that was entered (modules, dtype, training
                mode).
        """
        if self._thread is None:
            raise UsageError(
                "this observer is called outside its `with` block, where it counts nothing; write "
                "`with rd.observe(model) as obs: obs(**batch)`"
            )
        if args:
            raise UsageError(
                f"an observer takes the model's arguments by name, not a {type(args[0]).__name__} "
                "alone; write obs(**batch), or obs(input_ids=ids)"
            )
        try:
            with self.tokens.restricted_to(token_mask):
                return forward(self.model, batch)
        except (Exception, KeyboardInterrupt):
            self._undo()
            raise
        finally:
            self._running = False  # what a streamed model ran is counted, though it was left

    def group(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Forwards inside the context are counted under the calibration group `name`.

        Raises:
            UsageError: the name is no text, or empty; or the context lies in that of another group,
                for a token is of one.

        Example:
            >>> with rd.observe(model) as obs, obs.group("code"):
            ...     obs(**batch)
        """
        if not isinstance(name, str) or not name:
            raise UsageError(f"group {short(name)} is no name; give a text such as 'code'")
        self._pending = name
        return self._grouped(name)

    @contextlib.contextmanager
    def _grouped(self, name: str) -> Iterator[None]:
        self._pending = None
        if self._inside_group and name != self.current:
            raise UsageError(
                f"group {name!r} is entered inside group {self.current!r}, but a token is counted "
                "under one group; leave the first before"
            )
        before = self.current, self._inside_group
        self.current, self._inside_group = name, True
        try:
            yield
        finally:
            self.current, self._inside_group = before

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
        out and named under `provenance["unobserved"]`: they have no scores, good or bad. Which
        layers share a field that counts their experts is then under `provenance["stacks"]`.

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
        self._check_finite(kept)
        return SaliencyStats(kept, list(groups), self._provenance(list(kept)))

    def snapshot(self) -> SaliencyStats:
        """A copy on the CPU of what this process observed so far, for `restore` to go on from.

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

    def check_finite(self) -> None:
        """Raises DataError for the first layer, in the model's order, whose experts in this process
        gave NaN or Inf so far; of the layers behind it the input is not finite.
        """
        groups = len(self.groups or [DEFAULT_GROUP])
        called = {name: recorder for name, recorder in self._recorders.items() if recorder.called}
        self._check_finite({name: recorder.local(groups) for name, recorder in called.items()})

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
        """Refuses a forward that would be counted wrongly."""
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
                "gradients were enabled inside observe(), which computes none; leave out "
                "torch.enable_grad(), or train outside it"
            )
        self._check_model()
        self._running, self._groups_before = True, len(self.groups)
        self.forwards += 1

    def _check_model(self, *, all_modules: bool = False) -> None:
        """Raises UnsupportedModel unless the model is as it was found, in evaluation mode.

        Args:
            all_modules: look at the mode of every module, not only of the MoE layers' blocks.
        """
        blocks: list[tuple[str, nn.Module]] = [("", self.model)]
        for layer in self.layers:
            block_name, _, leaf = layer.name.rpartition(".")
            try:
                block = self.model.get_submodule(block_name)
                found = getattr(block, leaf, None)
            except AttributeError:
                found = None
            if found is not layer.module:
                raise UnsupportedModel(
                    f"{layer.name} is another module than when observe() was called, so its tokens "
                    "would not be counted; change the model before, and observe it anew"
                )
            blocks.append((block_name, block))
        for name, module in self.model.named_modules() if all_modules else blocks:
            check_mode(name, module)

    def _undo(self) -> None:
        """Takes back what a forward that failed has counted."""
        if self._running:
            for recorder in self._recorders.values():
                recorder.undo(self.forwards)
            del self.groups[self._groups_before :]
        self._running = False

    @torch.compiler.disable
    def _ended(self, _: nn.Module, __: Any, output: Any) -> None:
        """A forward is over, called by whomever; without output it failed."""
        if output is None:
            self._undo()
        self._running = False

    @torch.compiler.disable
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
        if self._notes:
            facts["notes"] = list(self._notes)
        unobserved = [layer.name for layer in self.layers if layer.name not in names]
        if not unobserved:
            return facts
        experts = {layer.name: layer.num_experts for layer in self.layers}
        stacks = stacks_of(self.model, experts)
        facts["stacks"] = {stack.field: list(stack.layers) for stack in stacks}
        return {**facts, "unobserved": unobserved}


@typed
def observe(model: PreTrainedModel, *, backend: str | None = None) -> Observer:
    """Collect expert statistics of every forward of `model` inside the context.

    No gradients are computed inside it. It may be entered again later: the statistics add up. Under
    autocast, experts compute in its dtype, as the model's own do.

    Args:
        model: a loaded MoE model in eval mode; of one that `torch.compile`, `DataParallel` or
            `DistributedDataParallel` has wrapped, the model inside runs.
        backend: kernel backend, never falling back; default the best one for each call.

    Raises:
        UsageError: `model` is no model.
        UnsupportedModel: see `find_moe_layers`.

    Example:
        >>> with rd.observe(model) as obs:
        ...     obs(input_ids=ids)
        >>> scores = rd.score(obs.stats)
    """
    return Observer(model, backend)
