"""Accuracy on the CPU: every statistic compared with a float64 oracle for the same layer inputs.

The oracle is independent of the library: a plain forward hook records the inputs of each experts
module (hidden states, expert ids, router weights), and the sums are computed in float64 from the
formula.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from bench import cpu_model, rows
from reap_driver import observe
from reap_kernels.testing import largest_relative_error

SUMS = ("router_weight_sum", "norm_sum", "weighted_norm_sum", "norm_sq_sum", "weighted_norm_sq_sum")


def _record(model: nn.Module, seen: dict[str, list[tuple[Tensor, ...]]]) -> list[Any]:
    def keep(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append(args)

    return [
        module.register_forward_pre_hook(keep(name))
        for name, module in model.named_modules()
        if name.endswith("mlp.experts")
    ]


def _oracle(module: Any, calls: list[tuple[Tensor, ...]]) -> tuple[Tensor, dict[str, Tensor]]:
    count = torch.zeros(module.num_experts, dtype=torch.int64)
    sums = {name: torch.zeros(module.num_experts, dtype=torch.float64) for name in SUMS}
    for hidden, ids, weights in calls:
        for expert in range(module.num_experts):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            x = hidden[token].double()
            gate, up = (x @ module.gate_up_proj[expert].double().T).chunk(2, dim=-1)
            f = (gate * torch.sigmoid(gate) * up) @ module.down_proj[expert].double().T
            norm, g = f.square().sum(-1).sqrt(), weights[token, slot].double()
            count[expert] += len(token)
            values = (g, norm, g * norm, norm**2, (g * norm) ** 2)
            for name, value in zip(SUMS, values, strict=True):
                sums[name][expert] += value.sum()
    return count, sums


def main(arguments: list[str]) -> None:
    """Measures float32 and bfloat16 and appends one row per dtype."""
    parser = argparse.ArgumentParser(prog="python -m bench accuracy_cpu", description=__doc__)
    parser.add_argument("--sequences", type=int, default=4, help="sequences of 512 tokens")
    options = parser.parse_args(arguments)
    for dtype in (torch.float32, torch.bfloat16):
        model = cpu_model.build(dtype)
        seen: dict[str, list[tuple[Tensor, ...]]] = {}
        hooks = _record(model, seen)
        with observe(model) as obs:
            for ids in cpu_model.tokens(options.sequences, 512, 1):
                obs(input_ids=ids)
        for hook in hooks:
            hook.remove()
        worst = dict.fromkeys(SUMS, 0.0)
        exact = True
        for name, layer in obs.stats.layers.items():
            count, sums = _oracle(model.get_submodule(name), seen[name])
            exact &= torch.equal(layer.count[0], count)
            for key, want in sums.items():
                error = largest_relative_error(layer.fields()[key][0], want)
                worst[key] = max(worst[key], error)
        row: dict[str, object] = {
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": options.sequences * 512,
            "counts_exact": exact,
            **{key: f"{error:.1e}" for key, error in worst.items()},
        }
        rows.write("accuracy_cpu", [row])
