"""llm-compressor's REAP pruning with experts observed by `reap_kernels`.

`KernelREAPPruningModifier` is its `REAPPruningModifier` with another observation: the choice of
experts, groups, pruning, several processes, the config and the report remain llm-compressor's.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

import reap_kernels as rk
from reap_driver.base.requirements import Unmet
from reap_driver.integrations.llm_compressor_attention import causal_attention, check_causal
from reap_kernels.errors import DataError

try:
    from compressed_tensors.utils import patch_attr
    from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag
    from llmcompressor.modeling.moe.linear_experts import (
        ExpertMLPWithGate,
        ExpertMLPWithoutGate,
        LinearExperts2D,
    )
    from llmcompressor.modifiers.factory import ModifierFactory
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
    from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker
except ImportError as error:
    raise Unmet(
        f"{__name__} needs llmcompressor 0.14 or newer, which cannot be imported ({error}); run "
        "`pip install reap-kernels[llmcompressor]`"
    ) from error

__all__ = ["KernelREAPPruningModifier", "causal_attention", "register"]

_KNOWN_FORWARDS = (ExpertMLPWithGate.forward, ExpertMLPWithoutGate.forward)


class KernelREAPPruningModifier(REAPPruningModifier):
    """Prunes experts by REAP saliency; one op computes and observes the experts of a layer.

    Fields, events and results are those of `REAPPruningModifier`; see its documentation. Where
    another modifier hooks the experts' modules in the same pass (GPTQ in one recipe, pipeline
    `sequential`), the experts run as llm-compressor runs them and their outputs are counted.

    Raises, during `oneshot`:
        UnsupportedModel: calibration attends to later tokens; see `causal_attention`.
        DataError: outputs of experts are not finite.

    Example:
        >>> from reap_driver.integrations.llm_compressor import KernelREAPPruningModifier
        >>> recipe = [KernelREAPPruningModifier(sparsity=0.25, report_path="kept.json")]
    """

    _stats: dict[str, rk.LayerStats] = PrivateAttr(default_factory=dict)
    _activations: dict[str, rk.Activation] = PrivateAttr(default_factory=dict)
    # MoE layers whose next forward counts: hooks are what llm-compressor turns on and off.
    _counted: set[str] = PrivateAttr(default_factory=set)
    _replaced: ExitStack = PrivateAttr(default_factory=ExitStack)

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Replaces the forward of the experts of every MoE layer."""
        for name, module in state.model.named_modules():
            if getattr(module, "is_causal", False) is True:
                hook = partial(self._check_causal, name)
                self.register_hook(module, hook, "forward_pre", with_kwargs=True)
        for name in self._moe_attrs.moe_layer_names:
            block = state.model.get_submodule(name)
            experts = getattr(block, self._moe_attrs.experts_attr)
            self._saliency_trackers[name] = REAPSaliencyTracker(self._moe_attrs.num_experts)
            self._activations[name] = _activation(experts)
            self.register_hook(experts, partial(self._count_next, name), "forward_pre")
            forward = MethodType(partial(self._forward, name, experts.forward), experts)
            self._replaced.enter_context(patch_attr(experts, "forward", forward))

    def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Prunes the layers observed by now."""
        for name, stats in self._stats.items():
            broken = int(stats.nonfinite.sum())
            if broken:
                self._release()
                raise DataError(
                    f"{name}: {broken} outputs of experts are NaN or infinite; calibrate in "
                    "bfloat16 or float32, or leave the layer out with `ignore`"
                )
            tracker = self._saliency_trackers[name]
            tracker.sum_saliency = stats.weighted_norm_sum[0]
            tracker.count = stats.count[0].double()
        super().on_sequential_epoch_end(state, event, **kwargs)
        self._stats.clear()

    def on_calibration_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Gives the experts their own forward back."""
        self._release()

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        """Changes the config, unless calibration ended before any layer was pruned."""
        return super().on_finalize(state, **kwargs) if self._retained_experts else True

    def _release(self) -> None:
        """Takes everything off the model."""
        self.remove_hooks()
        self._replaced.close()

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        """Inside, an error or Ctrl-C takes everything off the model, which may go on being used:
        llm-compressor tells no modifier that a calibration has failed.
        """
        try:
            yield
        except BaseException:
            self._release()
            raise

    def _check_causal(self, name: str, attention: nn.Module, args: Any, given: Any) -> None:
        with self._released_on_error():
            check_causal(name, attention, args, given)

    def _count_next(self, name: str, experts: LinearExperts2D, args: Any) -> None:
        """Pre-hook of experts: their forward counts, unless the layer is pruned already."""
        if name in self._saliency_trackers:
            self._counted.add(name)

    def _forward(
        self,
        name: str,
        plain: Callable[..., Tensor],
        experts: LinearExperts2D,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Forward of the experts of a layer: [T, H] of hidden [T, H], ids and weights [T, k]."""
        call = (hidden_states, top_k_index, top_k_weights)
        with self._released_on_error():
            stats = self._stats_of(name, experts, hidden_states.device)
            # The op has no gradient, which others (AutoRound) need in passes of their own.
            if not torch.is_grad_enabled() and _unwatched(experts):
                return rk.observe_layer(*call, _weights(experts, self._activations[name]), stats)
            if stats is None:
                return plain(*call)
            with _counting_outputs(experts, top_k_index, top_k_weights, stats):
                return plain(*call)

    def _stats_of(
        self, name: str, experts: LinearExperts2D, device: torch.device
    ) -> rk.LayerStats | None:
        """Where the forward that begins counts; None for one that does not count."""
        if name not in self._counted:
            return None
        self._counted.remove(name)
        if name not in self._stats:
            self._stats[name] = rk.LayerStats(experts.num_experts, device=device)
        return self._stats[name]


def register() -> None:
    """Lets recipes in YAML name `KernelREAPPruningModifier`.

    llm-compressor looks for the modifiers that a recipe names in its own packages and among
    registered ones; a recipe that holds an instance needs no registration.

    Example:
        >>> from reap_driver.integrations import llm_compressor
        >>> llm_compressor.register()
    """
    ModifierFactory.register(KernelREAPPruningModifier.__name__, KernelREAPPruningModifier)


def _activation(experts: LinearExperts2D) -> rk.Activation:
    """What the experts of a layer compute between their products, found by its values."""
    first = experts[0]
    limits = (getattr(experts, "limit", None), getattr(experts, "swiglu_limit", None))
    return rk.probe_activation(
        first._apply_gate if experts.has_gate else first.act_fn,
        intermediate_size=first.intermediate_size,
        gated=experts.has_gate,
        limits=[limit for limit in limits if limit is not None],
        alphas=[alpha for alpha in (getattr(experts, "alpha", None),) if alpha is not None],
        device=first.down_proj.weight.device,
    )


def _weights(experts: LinearExperts2D, activation: rk.Activation) -> rk.ExpertWeights:
    """The weights as the experts' modules hold them now; only biases are copied."""
    own = [experts[index] for index in range(experts.num_experts)]

    def bias(name: str) -> Tensor | None:
        linears = [getattr(expert, name) for expert in own]
        return None if linears[0].bias is None else torch.stack([one.bias for one in linears])

    gated = experts.has_gate
    return rk.ExpertWeights(
        up=[expert.up_proj.weight for expert in own],
        down=[expert.down_proj.weight for expert in own],
        activation=activation,
        gate=[expert.gate_proj.weight for expert in own] if gated else None,
        up_bias=bias("up_proj"),
        gate_bias=bias("gate_proj") if gated else None,
        down_bias=bias("down_proj"),
    )


def _unwatched(experts: LinearExperts2D) -> bool:
    """Whether the experts' modules need not run: they compute what their weights say, and nobody
    hooks them.
    """
    own = [experts[index] for index in range(experts.num_experts)]
    # Looks for names only: asking an offloaded module for its weight would move it.
    linears = [one for expert in own for one in expert.children() if "weight" in one._parameters]
    return (
        type(own[0]).forward in _KNOWN_FORWARDS
        and all(type(linear) is nn.Linear for linear in linears)
        and not any(map(_quantizes, linears))
        and not any(one._forward_hooks or one._forward_pre_hooks for one in (*own, *linears))
    )


def _quantizes(linear: nn.Module) -> bool:
    """Whether the forward of a linear module rounds, as calibration passes turn off."""
    return hasattr(linear, "quantization_scheme") and getattr(linear, "quantization_enabled", True)


@contextmanager
def _counting_outputs(
    experts: LinearExperts2D, top_k_index: Tensor, top_k_weights: Tensor, stats: rk.LayerStats
) -> Iterator[None]:
    """Adds the statistics of what the experts' own modules return meanwhile, in one forward."""

    def count(index: int, expert: nn.Module, args: Any, output: Tensor) -> None:
        slots, tokens = torch.where(top_k_index.T.eq(index))  # the order of LinearExperts2D's rows
        rows = output[tokens] if get_calibrate_all_experts_flag() else output
        ids = torch.full_like(tokens, index)
        rk.accumulate(rows, ids, top_k_weights[tokens, slots], stats)

    with ExitStack() as hooks:
        for index in range(experts.num_experts):
            handle = experts[index].register_forward_hook(partial(count, index))
            hooks.callback(handle.remove)
        yield
    stats.add_tokens(len(top_k_index))
