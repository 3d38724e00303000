"""Products that read FP8 codes on a GPU: against float64, on cases, layouts and formulas."""

from dataclasses import replace

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.lines import in_force
from bench.gpu.verify import NotHere
from reap_kernels.experts import triton_backend
from reap_kernels.experts.request import request_of
from reap_kernels.testing import (
    ACTIVATIONS,
    CASES,
    Case,
    make_inputs,
    make_quantized_experts,
    relative_error,
)
from reap_kernels.tuning import FP8, Entry
from tests.gpu.checks import Check, poisoned

# Several steps along H and I, and parts of tiles and of blocks of scales.
_FORM = replace(CASES[-1], tokens=600, hidden=320, intermediate=192)
_BOUND = 5e-3  # bf16 rounds h and the output


def exact(experts: rk.ExpertWeights) -> rk.ExpertWeights:
    """The experts in float64: each code times its scale, which float64 holds exactly."""

    def made(m: rk.Quantized | None) -> Tensor | None:
        if m is None:
            return None
        high, wide = m.block
        scales = m.scales.double().repeat_interleave(high, 1).repeat_interleave(wide, 2)
        return m.values.double() * scales[:, : m.shape[1], : m.shape[2]]

    parts = {name: made(getattr(experts, name)) for name in ("up", "gate", "down")}
    names = ("up_bias", "gate_bias", "down_bias")
    biases = {name: getattr(experts, name) for name in names}
    doubled = {name: None if bias is None else bias.double() for name, bias in biases.items()}
    return replace(experts, **parts, **doubled)


# Products read FP8 codes; the shipped table has it off.
_LINE = Entry("quantized", "half", None, None, backend="product")


def compare(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    case: Case,
    layout: str,
    activation: rk.Activation,
) -> str:
    """The output beside that of exact weights in float64; the same bits twice."""
    inputs = make_inputs(case, dtype, device=device)
    experts = make_quantized_experts(case, "fp8_block", layout, activation, device=device)
    routed = (inputs.topk_ids, inputs.topk_weights)
    request = request_of("layer", inputs.hidden, case.top_k, experts)
    reason = triton_backend.code_limits(request)
    if reason is not None:
        raise NotHere(reason)
    with in_force(device, [_LINE]), poisoned():
        assert triton_backend.launches(request).up.kernel == FP8
        out = rk.observe_layer(inputs.hidden, *routed, experts, backend=backend)
        again = rk.observe_layer(inputs.hidden, *routed, experts, backend=backend)
    ids, weights = routed
    truth = (inputs.hidden.double(), ids, weights.double(), exact(experts))
    error = relative_error(out, rk.observe_layer(*truth, backend="reference"))
    assert error <= _BOUND, f"the output is off by {error:.1e}, {_BOUND:.0e} is allowed"
    assert torch.equal(out, again), "two runs differ"
    return f"off by {error:.1e}"


def plan(smoke: bool) -> list[Check]:
    """Cases, layouts and formulas."""
    half, silu = torch.bfloat16, rk.Activation("silu")
    if smoke:
        small = replace(CASES[-1], tokens=8, experts=2, top_k=1, hidden=16, intermediate=16)
        return [Check("fp8 product", "triton", half, compare, (small, "stacked", silu))]
    found = [
        Check(f"fp8 product {case.name}", "triton", half, compare, (case, "stacked", silu))
        for case in CASES
        if case.tokens
    ]
    for activation in ACTIVATIONS:
        ungated = activation.kind == "relu2"
        for layout in ("ungated",) if ungated else ("stacked", "interleaved-biased", "blocks"):
            what = (_FORM, layout, activation)
            name = f"fp8 product {layout} {activation.kind}"
            found.append(Check(name, "triton", half, compare, what))
    return found
