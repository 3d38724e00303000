"""The reference backend against the formulas, one token and one slot at a time."""

import math

import pytest
import torch

import reap_kernels as rk
from reap_kernels import testing
from reap_kernels.activation import KINDS
from reap_kernels.testing import CASES, LAYOUTS, make_experts, make_inputs, relative_error

SMALL = [case for case in CASES if case.tokens <= 100]


def scalar_act(kind: str, g: float, u: float, limit: float, alpha: float) -> float:
    """Each activation in scalar Python, straight from its definition."""

    def silu(x: float) -> float:
        return x / (1 + math.exp(-x))

    if kind == "silu":
        return silu(g) * u
    if kind == "gelu_tanh":
        return 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    if kind == "relu2":
        return max(u, 0.0) ** 2
    clamped = min(max(u, -limit), limit)
    if kind == "silu_clamped_in":
        return silu(min(g, limit)) * clamped
    if kind == "silu_clamped_out":
        return min(silu(g), limit) * clamped
    g = min(g, limit)
    return g / (1 + math.exp(-alpha * g)) * (clamped + 1)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "opaque"])
def test_formula_is_its_definition(kind: str) -> None:
    torch.manual_seed(1)
    activation = rk.Activation(kind, limit=1.5)
    gate, up = torch.randn(2, 40, dtype=torch.float64) * 3
    want = [
        scalar_act(kind, g, u, 1.5, 1.702) for g, u in zip(gate.tolist(), up.tolist(), strict=True)
    ]
    projected = up[None] if kind == "relu2" else torch.cat([gate, up])[None]
    got = activation.apply(projected)[0]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def brute_force(inputs, experts, num_groups: int):
    """Output and fields by a Python loop over tokens and slots, in float64."""
    t, k = inputs.topk_ids.shape
    e = experts.num_experts
    out = torch.zeros(t, experts.hidden_size, dtype=torch.float64)
    fields = {name: torch.zeros(num_groups, e, dtype=torch.float64) for name in rk.stats.SUMS}
    fields["count"] = torch.zeros(num_groups, e, dtype=torch.int64)
    fields["out_max"] = torch.full((num_groups, e), -math.inf)
    fields["out_min"] = torch.full((num_groups, e), math.inf)
    fields["tokens"] = torch.zeros(num_groups, dtype=torch.int64)
    for token in range(t):
        counts = inputs.mask is None or bool(inputs.mask[token])
        group = int(inputs.group if isinstance(inputs.group, int) else inputs.group[token])
        fields["tokens"][group] += counts
        for slot in range(k):
            expert = int(inputs.topk_ids[token, slot])
            gate = float(inputs.topk_weights[token, slot])
            if not 0 <= expert < e or gate == 0:
                continue
            f = experts.project(expert, inputs.hidden[token : token + 1].double())[0]
            out[token] += gate * f
            if not counts:
                continue
            norm = math.sqrt(float((f * f).sum()))
            at = (group, expert)
            fields["count"][at] += 1
            fields["router_weight_sum"][at] += gate
            fields["norm_sum"][at] += norm
            fields["weighted_norm_sum"][at] += gate * norm
            fields["norm_sq_sum"][at] += norm**2
            fields["weighted_norm_sq_sum"][at] += (gate * norm) ** 2
            fields["out_max"][at] = max(float(fields["out_max"][at]), float(f.max()))
            fields["out_min"][at] = min(float(fields["out_min"][at]), float(f.min()))
    return out, fields


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference_layer_is_the_definition(case) -> None:
    inputs, experts = make_inputs(case, torch.float64), make_experts(case, dtype=torch.float64)
    stats = rk.LayerStats(case.experts, case.groups)
    got = rk.observe_layer(
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        experts,
        stats,
        mask=inputs.mask,
        group=inputs.group,
        backend="reference",
    )
    out, fields = brute_force(inputs, experts, case.groups)
    assert relative_error(got, out) < 1e-14
    for name, want in fields.items():
        value = stats.fields()[name]
        if value.dtype == torch.int64:
            assert torch.equal(value, want), name
        else:
            torch.testing.assert_close(value.double(), want.double(), rtol=1e-6, atol=0)
            if value.dtype == torch.float64:
                torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_describe_the_same_experts(layout: str) -> None:
    """Every layout without biases equals plain matrix arithmetic on the matrices it stores."""
    case = CASES[0]
    experts = make_experts(case, layout, dtype=torch.float64)
    matrices = testing._matrices(case, 0, torch.float64)
    x = torch.randn(5, case.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for expert in range(case.experts):
        gate, up = (x @ matrices[name][expert].T for name in ("gate", "up"))
        if experts.up_bias is not None:
            gate, up = gate + matrices["gate_bias"][expert], up + matrices["up_bias"][expert]
        inner = up.relu() ** 2 if layout == "ungated" else gate * torch.sigmoid(gate) * up
        want = inner @ matrices["down"][expert].T
        if experts.down_bias is not None:
            want = want + matrices["down_bias"][expert]
        torch.testing.assert_close(experts.project(expert, x), want, rtol=1e-12, atol=1e-12)
