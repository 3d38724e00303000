"""The all-experts algorithm, a baseline: every expert runs on every token to be observed.

For every MoE layer, after the layer's own forward, every expert runs on every token, and the
outputs are kept as [E, T, H] float32; then norms and sums of each expert's own tokens are computed.
The statistics are the same as ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def all_experts(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Observes a Qwen3-MoE model by the all-experts algorithm while the context is open.

    Yields:
        {layer name: float64 [3, E]: count, sum ||f||, sum g ||f||}, filled as the model runs.
    """
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            where = module.down_proj.device
            sums[name] = torch.zeros(3, module.num_experts, dtype=torch.float64, device=where)
            hooks.append(module.register_forward_hook(_hook(sums[name])))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _hook(total: Tensor) -> Any:
    def observe(module: Any, args: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        observe_module(total, module, *args)

    return observe


def observe_module(
    total: Tensor, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor
) -> None:
    """Adds one call of a Qwen3-MoE experts module to `total`, with its weights and activation."""

    def run(expert: int, x: Tensor) -> Tensor:
        gate_up = nn.functional.linear(x, module.gate_up_proj[expert])
        return nn.functional.linear(module._apply_gate(gate_up), module.down_proj[expert])

    observe_all(total, run, hidden, ids, weights)


def observe_all(
    total: Tensor,
    run: Callable[[int, Tensor], Tensor],
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> None:
    """Runs every expert on every token, then adds the norms and sums of its own tokens.

    Args:
        total: float64 [3, E]: count, sum ||f||, sum g ||f||; updated in place.
        run: (expert, [n, H]) -> [n, H], the expert's output, not multiplied by router weights.
        hidden: [T, H].
        ids: [T, k].
        weights: [T, k].
    """
    experts = total.shape[1]
    outputs = torch.zeros(experts, *hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in range(experts):
        outputs[expert] = run(expert, hidden)
    for expert in range(experts):
        chosen = ids == expert
        mask = chosen.any(dim=-1)
        norms = torch.linalg.vector_norm(outputs[expert][mask], dim=-1).double()
        gates = (weights * chosen).sum(dim=-1)[mask].double()
        total[0, expert] += mask.sum()
        total[1, expert] += norms.sum()
        total[2, expert] += (gates * norms).sum()
