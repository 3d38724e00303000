"""Expert statistics in float64, from plain torch hooks and the model's own eager code.

Independent of the library: hooks record the inputs of each experts module; f(x) of an expert is the
original forward of the module's class, in float64, for that expert alone with router weight 1.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Calls:
    """The inputs of one experts module: (hidden [T, H], ids [T, k], weights [T, k]) per call."""

    inputs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


def _is_llama4(module: nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextExperts"


@contextlib.contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, Calls]]:
    """Records the inputs of the experts modules `names` during forwards inside the context."""
    calls = {name: Calls() for name in names}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        if _is_llama4(module):
            block = model.get_submodule(name.rpartition(".")[0])
            handles.append(block.router.register_forward_hook(_router_hook(calls[name])))
        else:
            handles.append(module.register_forward_pre_hook(_experts_hook(calls[name])))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _experts_hook(calls: Calls) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, ids, weights = (a.detach().clone() for a in args)
        calls.inputs.append((hidden.reshape(-1, hidden.shape[-1]), ids, weights))

    return hook


def _router_hook(calls: Calls) -> Any:
    """Llama 4's experts receive scaled rows; the gates are what the router returns [T, E]."""

    def hook(_: nn.Module, args: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        hidden, scores = args[0].detach().clone(), output[0].detach().clone()
        ids = torch.arange(scores.shape[1]).expand_as(scores)
        calls.inputs.append((hidden, ids, scores))

    return hook


@torch.no_grad()
def expert_outputs(module: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """f_expert(hidden) [n, H] in float64, by the module's own eager forward."""
    double = copy.deepcopy(module).double()
    forward = inspect.unwrap(type(double).forward)
    ids = torch.full((len(hidden), 2), expert)  # two slots: longcat_flash cannot run one
    gate = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(hidden), 2)
    rows = hidden.double()
    if type(module).__name__ == "DbrxExperts":
        return forward(double, rows[None], ids, gate)[0]
    return forward(double, rows, ids, gate)


def expected(
    module: nn.Module, calls: Calls, num_experts: int, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Every field of one group's statistics, [E] (tokens: scalar), over all recorded calls.

    `mask`: [T] bool over the tokens of the only call, those that count.
    """
    keys = (
        "count",
        "router_weight_sum",
        "norm_sum",
        "weighted_norm_sum",
        "norm_sq_sum",
        "weighted_norm_sq_sum",
    )
    out = {key: torch.zeros(num_experts, dtype=torch.float64) for key in keys}
    out["out_max"] = torch.full((num_experts,), -torch.inf, dtype=torch.float64)
    out["out_min"] = torch.full((num_experts,), torch.inf, dtype=torch.float64)
    tokens = 0
    for hidden, ids, weights in calls.inputs:
        keep = torch.ones(len(hidden), dtype=torch.bool) if mask is None else mask
        tokens += int(keep.sum())
        for expert in range(num_experts):
            token, slot = torch.where((ids == expert) & (weights != 0) & keep[:, None])
            if not len(token):
                continue
            gate = weights[token, slot].double()
            if _is_llama4(module):  # the gate is inside: ||f(g x)|| is the contribution
                f = _llama4_outputs(module, hidden[token], gate, expert)
                weighted = f.norm(dim=1)
            else:
                f = expert_outputs(module, hidden[token], expert)
                weighted = gate * f.norm(dim=1)
            norm = f.norm(dim=1)
            out["count"][expert] += len(token)
            out["router_weight_sum"][expert] += gate.sum()
            out["norm_sum"][expert] += norm.sum()
            out["weighted_norm_sum"][expert] += weighted.sum()
            out["norm_sq_sum"][expert] += norm.square().sum()
            out["weighted_norm_sq_sum"][expert] += weighted.square().sum()
            out["out_max"][expert] = torch.maximum(out["out_max"][expert], f.max())
            out["out_min"][expert] = torch.minimum(out["out_min"][expert], f.min())
    out["tokens"] = torch.tensor(tokens)
    return out


@torch.no_grad()
def _llama4_outputs(module: nn.Module, hidden: Tensor, gate: Tensor, expert: int) -> Tensor:
    """f(g x) [n, H] in float64, written out; the scaled row is rounded as the model rounds it."""
    scaled = (hidden * gate.to(hidden.dtype)[:, None]).double()
    gate_up = scaled @ module.gate_up_proj[expert].detach().double()
    left, right = gate_up.chunk(2, dim=-1)
    return (right * module.act_fn(left)) @ module.down_proj[expert].detach().double()


def assert_matches(layer: Any, truth: dict[str, Tensor], bound: float) -> None:
    """Counts and tokens exact, sums within `bound` relative (squares: twice, as squaring doubles a
    relative error), extrema within ten times it of their scale."""
    total = layer.total()
    assert torch.equal(total.count[0].double(), truth["count"]), "counts differ"
    assert int(total.tokens[0]) == int(truth["tokens"])
    assert int(total.nonfinite.sum()) == 0
    for key in (
        "router_weight_sum",
        "norm_sum",
        "weighted_norm_sum",
        "norm_sq_sum",
        "weighted_norm_sq_sum",
    ):
        got, want = getattr(total, key)[0], truth[key]
        error = ((got - want).abs() / want.abs().clamp_min(1e-30))[want != 0]
        worst = float(error.max()) if error.numel() else 0.0
        allowed = 2 * bound if "_sq_" in key else bound
        assert worst <= allowed, f"{key}: relative error {worst:.2e} above {allowed:.0e}"
        assert torch.equal(got == 0, want == 0), f"{key}: zeros differ"
    reached = truth["count"] > 0
    for key in ("out_max", "out_min"):
        got, want = getattr(total, key)[0].double(), truth[key]
        assert torch.equal(got[~reached], want[~reached])
        scale = want[reached].abs().max().clamp_min(1e-30)
        assert float((got - want)[reached].abs().max() / scale) <= 10 * bound, key
