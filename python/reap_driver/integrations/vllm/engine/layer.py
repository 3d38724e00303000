"""One MoE layer of vLLM, observed and masked between its router and its experts.

Two functions of the layer's own parts are wrapped, on these instances alone:

* `router.select_experts`: the mask lowers the logits of removed experts before the model's own
  routing, whose groups, normalization and scaling stay as they are.
* `routed_experts.forward_modular`: each token is given k times to vLLM's own kernel, with one
  expert and weight 1. What comes back are the experts' outputs before they are combined, whatever
  the kernel, the layout of weights and their quantization.

Buffers that a CUDA graph may read keep their place, and are changed in place only.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce

import reap_kernels as rk
from reap_driver.integrations.vllm.engine import layers, rows
from reap_kernels.errors import UnsupportedModel


class Step(Protocol):
    """What a layer asks of the forward pass that it is in.

    Attributes:
        real: whether requests are computed, and no profiling, warm-up or capture of graphs.
        observed: whether this pass is to be observed.
        mode: "off", "replace" or "shadow".
        num_groups: groups that tokens may have.
    """

    real: bool
    observed: bool
    mode: str
    num_groups: int

    def counted(self, tokens: int) -> Tensor:
        """[tokens] bool: whether each token counts."""

    def groups(self, tokens: int) -> Tensor:
        """[tokens] int64: the group of each."""


def described(error: Exception) -> str:
    """What an error of vLLM or torch says, on one line; assertions often say nothing."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


class HookedLayer:
    """An MoE layer whose experts are observed and masked.

    Args:
        name: of the layer in the model.
        runner: the layer, a `MoERunner`.
        step: the forward pass that the worker is in.

    Attributes:
        refusal: why the layer cannot be observed, or None.
        mask_refusal: why its experts cannot be masked, or None.
        masked: ids of the experts that are removed.
        stats: what has been observed, or None before `begin`.
        error: what went wrong in a forward pass, or None. Such a pass is computed by vLLM alone.

    Example:
        >>> layer = HookedLayer("model.layers.0.mlp.experts", runner, step)
        >>> layer.install()
        >>> layer.set_mask([3, 7])
    """

    def __init__(self, name: str, runner: Any, step: Step) -> None:
        self.name, self.runner, self.step = name, runner, step
        self._facts = layers.facts(runner)
        self.refusal = layers.observation_refusal(runner)
        self.mask_refusal = layers.mask_refusal(runner)
        self.masked: list[int] = []
        self.stats: rk.LayerStats | None = None
        self.error: str | None = None
        device = next(runner.routed_experts.parameters()).device
        # A graph holds what ran when it was captured, so the mask is always applied where there
        # may be one.
        self._captured = device.type != "cpu"
        self._always = self._captured and self.mask_refusal is None
        config = runner.moe_config
        # Kernels for GPUs have working memory for the most tokens of a step.
        self._most_rows = int(config.max_num_tokens) if self._captured else rows.MOST_ROWS
        self._sums_ranks = config.tp_size > 1 and not runner._fused_output_is_reduced
        # Whether an expert's input is multiplied by its weight (Llama 4), not its output.
        self._weights_input = bool(runner.routed_experts.apply_router_weight_on_input)
        with torch.inference_mode(False):
            self._removed = torch.zeros(self.experts, dtype=torch.bool, device=device)
            # Calls of the router and of the experts: those that graphs replay, and those of Python.
            self._replayed = torch.zeros(2, dtype=torch.int64, device=device)
        self._calls = [0, 0]
        self._saved: list[Tensor] = []
        self._own_select = runner.router.select_experts
        self._own_forward = runner.routed_experts.forward_modular

    @property
    def experts(self) -> int:
        """E, without copies of experts."""
        return int(self._facts["num_experts"])

    def facts(self) -> dict[str, Any]:
        """What the layer is, as `layers.facts` says, with `refusal` and `mask_refusal`."""
        return {**self._facts, "refusal": self.refusal, "mask_refusal": self.mask_refusal}

    def install(self) -> None:
        """Wraps the two functions. To be called before vLLM compiles or captures the model; where
        it compiles, `compiled.make_opaque` is to be called too.
        """
        self.runner.router.select_experts = self._select
        object.__setattr__(self.runner.routed_experts, "forward_modular", self._forward)

    def remove(self) -> None:
        """Clears the mask and gives the layer its own functions back."""
        if self.masked:
            self.set_mask([])
        self.runner.router.__dict__.pop("select_experts", None)
        self.runner.routed_experts.__dict__.pop("forward_modular", None)

    def calls(self) -> int:
        """How often router and experts have both run through this layer, in graphs too."""
        return int(self._replayed.min()) if self._captured else min(self._calls)

    # Masks

    def check_mask(self, removed: Sequence[int]) -> None:
        """Checks that a mask can be set, without setting it.

        Raises:
            UnsupportedModel: the layer cannot be masked.
            PlanError: unknown experts, or too few are left.
        """
        if not removed:
            return
        if self.mask_refusal is not None:
            raise UnsupportedModel(f"layer {self.name} cannot be masked: {self.mask_refusal}")
        names = ("top_k", "n_group", "topk_group")
        shape = {name: int(self._facts[name]) for name in names}
        rows.check_removed(self.name, removed, experts=self.experts, **shape)

    def set_mask(self, removed: Sequence[int]) -> None:
        """Removes exactly these experts from routing; [] gives all back, bit by bit.

        Args:
            removed: ids of experts.

        Raises:
            UnsupportedModel, PlanError: see `check_mask`. Nothing has changed.
        """
        self.check_mask(removed)
        ids = torch.tensor(sorted(removed), dtype=torch.int64, device=self._removed.device)
        with torch.inference_mode():
            biases = layers.selection_biases(self.runner)
            for bias, saved in zip(biases, self._saved, strict=False):
                bias.copy_(torch.where(self._removed, saved, bias))
            self._removed.zero_()
            self._removed[ids] = True
            self._saved = [bias.clone() for bias in biases]
            for bias in biases:
                bias.masked_fill_(self._removed, rows.lowest(bias.dtype))
        self.masked = sorted(removed)

    def _select(
        self, hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self._count(0)
        if self._always or self.masked:
            low = rows.lowest(router_logits.dtype)
            router_logits = router_logits.masked_fill(self._removed, low)
        return self._own_select(hidden_states, router_logits, *args, **kwargs)

    # Statistics

    def begin(self, num_groups: int) -> None:
        """Makes room for statistics of groups; those there are keep their values.

        Raises:
            UnsupportedModel: the layer cannot be observed.
        """
        if self.refusal is not None:
            raise UnsupportedModel(f"layer {self.name} cannot be observed: {self.refusal}")
        self.error = None
        if self.stats is None:
            self.stats = rk.LayerStats(self.experts, num_groups, self._removed.device)
        else:
            self.stats.grow_groups(num_groups)

    def reset(self) -> None:
        """Forgets what has been observed; the next `begin` starts anew."""
        self.stats = None

    def _forward(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self._count(1)
        step = self.step
        if not (step.real and step.observed) or self.stats is None or self.error is not None:
            return self._own_forward(x, topk_weights, topk_ids, *args, **kwargs)
        if step.mode == "replace":
            out = self._guarded(x, topk_weights, topk_ids, combine=True)
            if out is not None:
                return out
            return self._own_forward(x, topk_weights, topk_ids, *args, **kwargs)
        # The kernel may compute in place of its input, so what it is given is observed first.
        self._guarded(x, topk_weights, topk_ids, combine=False)
        return self._own_forward(x, topk_weights, topk_ids, *args, **kwargs)

    def _guarded(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, combine: bool
    ) -> Tensor | None:
        """`_observe`, whose failure must not end the engine: it is kept for the status, and the
        layer is not observed any more.

        Ranks that sum rows must all fail, or none: one that left would let the others wait in an
        all-reduce. What depends on shapes, dtypes or the kernel fails on all of them; memory may be
        short on one alone, which is raised there, and ends the engine.
        """
        try:
            return self._observe(x, topk_weights, topk_ids, combine)
        except Exception as error:
            if self._sums_ranks and isinstance(error, torch.OutOfMemoryError):
                raise
            self.error = f"layer {self.name}: {described(error)}"
            return None

    def _observe(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, combine: bool
    ) -> Tensor | None:
        """Adds what the experts compute for these tokens to the statistics.

        Args:
            x: [T, H].
            topk_weights: [T, k] float.
            topk_ids: [T, k] integers; other than 0..E-1 are experts that are not counted.
            combine: whether the layer's output is wanted.

        Returns:
            The output [T, H], under tensor parallelism this rank's part of it; or None.
        """
        assert self.stats is not None
        tokens, k = topk_ids.shape
        counted, groups = self.step.counted(tokens), self.step.groups(tokens)
        outputs = []
        for part in rows.chunks(tokens, k, x.shape[-1], self._most_rows):
            weights, ids = topk_weights[part], topk_ids[part]
            y = self._expert_rows(x[part], weights, ids)
            group = 0 if self.stats.num_groups == 1 else groups[part].repeat_interleave(k)
            mask = counted[part].repeat_interleave(k)
            self._record(y, ids.reshape(-1), weights.reshape(-1), mask, group)
            if combine:
                outputs.append(rows.combined(y, None if self._weights_input else weights, len(ids)))
        self.stats.tokens.scatter_add_(0, groups, counted.to(torch.int64))
        if not combine:
            return None
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _expert_rows(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """f(x) of each token and its experts, [T * k, H]; f(g x) where inputs are weighted.

        The kernel is given copies: that for CPUs overwrites weights it has multiplied inputs by.
        """
        shape = (ids.numel(), 1)
        weights = weights.clone() if self._weights_input else torch.ones_like(weights)
        y = self._own_forward(
            x.repeat_interleave(ids.shape[1], dim=0),
            weights.reshape(shape),
            ids.clone().reshape(shape),
        )
        if not isinstance(y, Tensor):
            raise UnsupportedModel(
                f"its kernel {self._facts['kernel']} returned {type(y).__name__} in place of a "
                "tensor; start vLLM with `--moe-backend triton`"
            )
        return y

    def _record(
        self, y: Tensor, ids: Tensor, weights: Tensor, mask: Tensor, group: Tensor | int
    ) -> None:
        """Adds rows [S, H] with their experts, router weights, marks and groups, each [S]."""
        assert self.stats is not None
        ids = ids.long()
        local = self._local_experts()
        if local is not None:  # expert parallel: those of other ranks are counted there
            ids = torch.where(local[ids.clamp(min=0)] >= 0, ids, -1)
        elif self._sums_ranks:
            y = tensor_model_parallel_all_reduce(y.clone())
        hidden, scale = self._facts["hidden_size"], self._facts["scale"]
        if y.shape[1] != hidden:
            y = y[:, :hidden]  # padding would be seen in extremes
        if scale != 1:
            weights = weights * scale
        if not self._weights_input:
            rk.accumulate(y, ids, weights, self.stats, mask=mask, group=group)
        else:
            self._record_weighted(y, ids, weights, mask & (weights != 0), group)

    def _local_experts(self) -> Tensor | None:
        """[E] integers, negative for experts of other ranks; None where this rank has all."""
        if not self.runner.moe_config.use_ep:
            return None
        found: Tensor | None = self.runner.routed_experts.expert_map_manager.expert_map
        return found

    def _record_weighted(
        self, y: Tensor, ids: Tensor, weights: Tensor, mask: Tensor, group: Tensor | int
    ) -> None:
        """The same of f(g x), whose contribution is its own norm; the sum of weights is that of g,
        as the driver's adapter for Llama 4 records both.
        """
        assert self.stats is not None
        part = rk.LayerStats(self.experts, self.stats.num_groups, y.device)
        rk.accumulate(y, ids, torch.ones_like(weights), part, mask=mask, group=group)
        valid = mask & (ids >= 0) & (ids < self.experts) & y.float().norm(dim=1).isfinite()
        places = torch.where(valid, group * self.experts + ids, 0)
        sums = part.router_weight_sum.view(-1)
        sums.zero_().index_add_(0, places, torch.where(valid, weights, 0).double())
        self.stats.merge_(part)

    def _count(self, place: int) -> None:
        if self._captured:
            self._replayed[place].add_(1)
        else:
            self._calls[place] += 1
