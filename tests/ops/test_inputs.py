"""Every deliberate refusal of the kernel library: the error's class, and what it names."""

from dataclasses import replace

import pytest
import torch

import reap_kernels as rk
from reap_kernels import dispatch, errors
from reap_kernels.errors import (
    BackendUnavailable,
    DtypeError,
    ReapError,
    ShapeError,
    UnsupportedModel,
)
from reap_kernels.testing import CASES, make_experts, make_inputs

CASE = CASES[0]
EXPERTS = make_experts(CASE)
T, K, H = CASE.tokens, CASE.top_k, CASE.hidden

BAD_CALLS = {
    "hidden width": (ShapeError, "hidden", {"hidden": torch.zeros(T, H + 1)}),
    "hidden rank": (ShapeError, "hidden", {"hidden": torch.zeros(1, T, H)}),
    "hidden dtype": (DtypeError, "hidden", {"hidden": torch.zeros(T, H, dtype=torch.float64)}),
    "ids rank": (ShapeError, "topk_ids", {"topk_ids": torch.zeros(T * K, dtype=torch.int64)}),
    "ids float": (DtypeError, "topk_ids", {"topk_ids": torch.zeros(T, K)}),
    "ids tokens": (
        ShapeError,
        "topk_ids",
        {
            "topk_ids": torch.zeros(T - 1, K, dtype=torch.int64),
            "topk_weights": torch.zeros(T - 1, K),
        },
    ),
    "weights shape": (ShapeError, "topk_weights", {"topk_weights": torch.zeros(T, K + 1)}),
    "weights int": (
        DtypeError,
        "topk_weights",
        {"topk_weights": torch.zeros(T, K, dtype=torch.int64)},
    ),
    "mask shape": (ShapeError, "mask", {"mask": torch.ones(T + 1, dtype=torch.bool)}),
    "mask dtype": (DtypeError, "mask", {"mask": torch.ones(T)}),
    "group beyond": (ShapeError, "grow_groups", {"group": 1}),
    "group ids beyond": (ShapeError, "grow_groups", {"group": torch.full((T,), 3)}),
    "group shape": (ShapeError, "group", {"group": torch.zeros(T + 1, dtype=torch.int64)}),
    "group float": (DtypeError, "group", {"group": torch.zeros(T)}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_observe_layer_refuses(name: str) -> None:
    error, mentions, changes = BAD_CALLS[name]
    inputs = replace(make_inputs(CASE), **changes)
    stats = rk.LayerStats(CASE.experts)
    with pytest.raises(error, match=mentions):
        rk.observe_layer(
            inputs.hidden,
            inputs.topk_ids,
            inputs.topk_weights,
            EXPERTS,
            stats,
            mask=inputs.mask,
            group=inputs.group,
        )
    assert int(stats.counts.sum()) == 0


def test_statistics_of_another_layer_are_refused() -> None:
    inputs = make_inputs(CASE)
    with pytest.raises(ShapeError, match="9 experts"):
        rk.observe_layer(
            inputs.hidden, inputs.topk_ids, inputs.topk_weights, EXPERTS, rk.LayerStats(9)
        )


@pytest.mark.parametrize(
    ("error", "mentions", "changes"),
    [
        (ShapeError, "y has", {"y": torch.zeros(4)}),
        (DtypeError, "float", {"y": torch.zeros(4, 2, dtype=torch.int32)}),
        (DtypeError, "expert_ids", {"expert_ids": torch.zeros(4)}),
        (ShapeError, "expert_ids", {"expert_ids": torch.zeros(5, dtype=torch.int64)}),
        (ShapeError, "router_weights", {"router_weights": torch.zeros(3)}),
    ],
)
def test_accumulate_refuses(error: type[ReapError], mentions: str, changes: dict) -> None:
    arguments = {
        "y": torch.zeros(4, 2),
        "expert_ids": torch.zeros(4, dtype=torch.int64),
        "router_weights": torch.ones(4),
    }
    with pytest.raises(error, match=mentions):
        rk.accumulate(**{**arguments, **changes}, stats=rk.LayerStats(3))


UP, DOWN = torch.zeros(4, 6, 5), torch.zeros(4, 5, 3)
SILU = rk.Activation("silu")

BAD_WEIGHTS = {
    "down rank": (ShapeError, "down", {"down": torch.zeros(5, 3)}),
    "ragged experts": (ShapeError, "up", {"up": [torch.zeros(6, 5), torch.zeros(4, 5)]}),
    "up width": (ShapeError, "up", {"up": torch.zeros(4, 6, 7)}),
    "up rows": (ShapeError, "rows", {"up": torch.zeros(4, 5, 5)}),
    "ungated rows": (ShapeError, "rows", {"activation": rk.Activation("relu2")}),
    "gate shape": (ShapeError, "gate", {"up": UP[:, :3], "gate": torch.zeros(4, 2, 5)}),
    "separate and interleaved": (
        ShapeError,
        "interleaved",
        {"up": UP[:, :3], "gate": UP[:, 3:], "interleaved": True},
    ),
    "up bias": (ShapeError, "up_bias", {"up_bias": torch.zeros(4, 3)}),
    "down bias": (ShapeError, "down_bias", {"down_bias": torch.zeros(3, 5)}),
    "gate bias alone": (ShapeError, "gate_bias", {"gate_bias": torch.zeros(4, 3)}),
    "mixed dtypes": (DtypeError, "dtypes", {"up": UP.half()}),
    "integer weights": (DtypeError, "dtypes", {"up": UP.int(), "down": DOWN.int()}),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_expert_weights_refuse(name: str) -> None:
    error, mentions, changes = BAD_WEIGHTS[name]
    with pytest.raises(error, match=mentions):
        rk.ExpertWeights(**{"up": UP, "down": DOWN, "activation": SILU, **changes})


def test_gate_formulas_refuse() -> None:
    with pytest.raises(UnsupportedModel, match="'tanh' is not known"):
        rk.Activation("tanh")
    with pytest.raises(UnsupportedModel, match="needs `fn`"):
        rk.Activation("opaque")
    with pytest.raises(UnsupportedModel, match="takes no `fn`"):
        rk.Activation("silu", fn=torch.relu)
    with pytest.raises(ShapeError, match="intermediate_size"):
        rk.probe_activation(torch.relu, intermediate_size=4, gated=True)


def test_explicit_backend_never_falls_back(monkeypatch) -> None:
    inputs = make_inputs(CASE)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, EXPERTS)
    with pytest.raises(BackendUnavailable, match=r"'warp'.*choose one of reference, cpu, triton"):
        rk.observe_layer(*call, backend="warp")
    monkeypatch.setenv("REAP_BACKEND", "warp")
    with pytest.raises(BackendUnavailable, match="warp"):
        rk.observe_layer(*call)
    assert rk.observe_layer(*call, backend="reference").shape == inputs.hidden.shape
    monkeypatch.delenv("REAP_BACKEND")
    monkeypatch.setenv("REAP_CPU_DTYPE", "float8")
    half = make_inputs(CASE, torch.bfloat16)
    experts = make_experts(CASE, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match="REAP_CPU_DTYPE='float8'"):
        rk.observe_layer(half.hidden, half.topk_ids, half.topk_weights, experts)


def test_a_refusal_carries_its_reason() -> None:
    request = dispatch.Request("layer", torch.device("meta"), torch.float32, "silu")
    with pytest.raises(BackendUnavailable, match="inputs are on meta"):
        dispatch.select(request, "cpu")


def test_explain_gives_one_choice_and_reasons_for_the_rest(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for requested in (None, "reference"):
        verdicts = rk.explain("cpu", torch.bfloat16, backend=requested)
        for op in dispatch.OPS:
            chosen = [v.backend for v in verdicts if v.op == op and v.reason is None]
            # To dequantize, plain torch operations are all a CPU needs.
            assert chosen == [requested or ("reference" if op == "dequant" else "cpu")]
    elsewhere = {v.backend: v.reason for v in rk.explain("meta") if v.op == "layer"}
    gpu = "inputs are on meta; Triton serves CUDA and ROCm devices"
    assert elsewhere == {
        "cpu": "inputs are on meta, not the CPU",
        "triton": gpu,
        "grouped_mm": gpu,
        "cuda": "inputs are on meta; CUDA kernels serve NVIDIA devices",
        "wgmma": "inputs are on meta; CUDA kernels serve NVIDIA devices",
        "reference": None,
    }


def test_a_backend_registers_once() -> None:
    with pytest.raises(ValueError, match="already registered"):
        dispatch.register(dispatch.Backend("layer", "cpu", lambda _: 1, lambda _: None, print))


def test_errors_are_a_closed_set_with_exit_codes() -> None:
    kinds = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and ReapError in kind.__bases__
    }
    assert kinds == {
        "UsageError": 3,
        "ShapeError": 3,
        "DtypeError": 3,
        "BackendUnavailable": 4,
        "KernelError": 4,
        "UnsupportedModel": 3,
        "CheckpointError": 3,
        "PlanError": 3,
        "DataError": 3,
        "ResourceError": 4,
    }
