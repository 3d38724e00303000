"""Llama 4: the router weight scales an expert's input, and every expert runs on every token.

What the expert adds to the output is f(g x) itself, so its contribution is ||f(g x)||: that is what
`norm_sum`, `weighted_norm_sum` and their squares record here, while `router_weight_sum`
records g. Only the selected pairs are run; the others would be f(0) = 0.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reap_driver.model.adapters.adapter import (
    ExpertCall,
    ExpertsModule,
    KernelAdapter,
    Recorder,
    Sizes,
    forward_replaced,
)
from reap_kernels import Activation, ExpertWeights, LayerStats, observe_layer, probe_activation


class Llama4Experts(KernelAdapter):
    """`experts(hidden [E * T, H])`, rows scaled by the router and sorted by expert."""

    name = "llama4"

    def serves(self, module: ExpertsModule, block: ExpertsModule) -> bool:
        return type(module).__name__ == "Llama4TextExperts"

    def sizes(self, module: ExpertsModule) -> Sizes:
        experts, inner, hidden = module.down_proj.shape
        return Sizes(experts, hidden, inner)

    def activation(self, module: ExpertsModule) -> Activation:
        def function(projected: Tensor) -> Tensor:
            gate, up = projected.chunk(2, dim=-1)
            activated: Tensor = module.act_fn(gate)
            return up * activated

        return probe_activation(
            function,
            intermediate_size=self.sizes(module).intermediate_size,
            gated=True,
            device=module.down_proj.device,
        )

    def weights(self, module: ExpertsModule, activation: Activation) -> ExpertWeights:
        up, down = module.gate_up_proj.detach(), module.down_proj.detach()
        return ExpertWeights(up.transpose(1, 2), down.transpose(1, 2), activation)

    @contextlib.contextmanager
    def bind(
        self, module: ExpertsModule, block: ExpertsModule, recorder: Recorder
    ) -> Iterator[None]:
        scores: list[Tensor] = []

        def remember(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
            scores[:] = [output[0]]

        own = inspect.unwrap(type(module).forward)

        def run(hidden_states: Tensor) -> Tensor:
            return _run(recorder, hidden_states, scores.pop(), lambda rows: own(module, rows))

        handle = block.router.register_forward_hook(remember)
        try:
            with forward_replaced(module, run):
                yield
        finally:
            handle.remove()


def _run(
    recorder: Recorder, rows: Tensor, scores: Tensor, eager: Callable[[Tensor], Tensor]
) -> Tensor:
    """Output rows [E * T, H] of scaled input rows [E * T, H] and router scores [T, E]."""
    operands, weights = recorder.operands(rows)
    tokens, experts = scores.shape
    recorder.routed(torch.arange(experts, device=scores.device).expand_as(scores), scores)
    selected = scores.T != 0
    expert, token = selected.nonzero(as_tuple=True)  # ascending by expert
    flat = expert * tokens + token
    mask = recorder.token_mask(tokens, rows.device)
    recorder.watch(rows, None if mask is None else mask.repeat(experts))
    stats, group = recorder.open(rows.device)
    part = LayerStats(experts, stats.num_groups, stats.device)
    counted = None if mask is None else mask[token]
    ones = torch.ones(len(flat), 1, dtype=torch.float32, device=rows.device)
    routed = observe_layer(
        operands[flat],
        expert[:, None],
        ones,
        weights,
        part,
        mask=counted,
        group=group,
        backend=recorder.backend,
        gram=recorder.gram(rows.device),  # of f(g x), whose weight is 1
    )
    # The op was given router weights of 1, since the input is scaled already, and one row per
    # (token, expert) pair. What it recorded of router weights and tokens is replaced.
    counts = routed.float().norm(dim=1).isfinite()
    counts = counts if counted is None else counts & counted
    router_weights = torch.where(counts, scores.T[expert, token].double(), 0)
    part.router_weight_sum[group] = torch.segment_reduce(
        router_weights, "sum", lengths=selected.sum(1), initial=0
    )
    part.tokens[group] = tokens if mask is None else mask.sum()
    stats.merge_(part)
    out = torch.zeros_like(rows)
    out[flat] = routed.to(out.dtype)
    sample = recorder.sample(tokens, mask, rows.device)
    if sample is not None:
        hidden = rows.shape[-1]
        few = rows.view(experts, tokens, hidden)[:, sample.rows].reshape(-1, hidden)
        ours = out.view(experts, tokens, hidden)[:, sample.rows].reshape(-1, hidden)
        recorder.compare(sample, ours, eager(few))
    call = ExpertCall(operands[flat], expert[:, None], ones, mask, token)
    out[flat] = recorder.computed(call, out[flat])
    return out
