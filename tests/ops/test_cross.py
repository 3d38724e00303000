"""Cross moments of targets and inner activations, against the formula, slot by slot in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reap_kernels as rk
from reap_kernels.cross import gpu
from reap_kernels.errors import BackendUnavailable, DtypeError, ShapeError
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.testing import (
    ACTIVATIONS,
    CASES,
    LAYOUTS,
    Case,
    Inputs,
    make_experts,
    make_inputs,
    relative_error,
)

BACKENDS = ["reference", "cpu", "triton"]
# A GPU backend rounds h, g h and the targets to the model's dtype.
ROUNDED = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
SMALL = replace(CASES[-1], tokens=24, experts=5, top_k=3, hidden=40, intermediate=24)


def targets_of(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(11)
    return torch.randn(case.tokens, case.hidden, generator=rng).to(dtype)


def truth(case: Case, inputs: Inputs, experts: rk.ExpertWeights, targets: Tensor) -> Tensor:
    """[E, H, I] float64."""
    out = torch.zeros(case.experts, case.hidden, case.intermediate, dtype=torch.float64)
    for token in range(case.tokens):
        if inputs.mask is not None and not inputs.mask[token]:
            continue
        x = inputs.hidden[token : token + 1].double()
        for expert, g in zip(
            inputs.topk_ids[token].tolist(), inputs.topk_weights[token].tolist(), strict=True
        ):
            if g != 0 and 0 <= expert < case.experts:
                h = experts.inner(expert, x)[0]
                out[expert] += g * torch.outer(targets[token].double(), h)
    return out


def cross(
    case: Case,
    inputs: Inputs,
    experts: rk.ExpertWeights,
    targets: Tensor,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.zeros(case.experts, case.hidden, case.intermediate)
    rk.cross(
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        experts,
        targets,
        out,
        mask=inputs.mask,
        backend=backend,
    )
    return out


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_case_is_the_formula(case: Case, backend: str) -> None:
    inputs, experts, targets = make_inputs(case), make_experts(case), targets_of(case)
    want = truth(case, inputs, experts, targets)
    got = cross(case, inputs, experts, targets, backend)
    assert relative_error(got, want) <= 1e-6
    again = cross(case, inputs, experts, targets, backend)
    assert torch.equal(got, again)
    cross(case, inputs, experts, targets, backend, again)
    assert relative_error(again, 2 * want) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layout(layout: str, backend: str) -> None:
    inputs, targets = make_inputs(SMALL), targets_of(SMALL)
    kinds = [a for a in ACTIVATIONS if (a.kind == "relu2") == (layout == "ungated")]
    experts = make_experts(SMALL, layout, kinds[-1])
    want = truth(SMALL, inputs, experts, targets)
    assert relative_error(cross(SMALL, inputs, experts, targets, backend), want) <= 1e-6


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (dtype, backend)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for backend in BACKENDS
        if dtype != torch.float64 or backend != "triton"
    ],
)
def test_every_dtype(dtype: torch.dtype, backend: str) -> None:
    inputs, experts = make_inputs(SMALL, dtype), make_experts(SMALL, dtype=dtype)
    for own in (dtype, torch.float32):
        targets = targets_of(SMALL, own)
        want = truth(SMALL, inputs, experts, targets)
        bound = ROUNDED.get(dtype, 1e-6) if backend == "triton" else 1e-6
        assert relative_error(cross(SMALL, inputs, experts, targets, backend), want) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_do_not_count_may_hold_anything(backend: str) -> None:
    case = replace(SMALL, masked=0.0)
    inputs, experts, targets = make_inputs(case), make_experts(case), targets_of(case)
    inputs.hidden[2], targets[2], targets[5] = torch.nan, torch.nan, torch.nan
    inputs.topk_weights[5] = 0.0
    mask = torch.ones(case.tokens, dtype=torch.bool)
    mask[2] = False
    inputs = replace(inputs, mask=mask)
    want = truth(case, inputs, experts, targets)
    got = cross(case, inputs, experts, targets, backend)
    assert bool(got.isfinite().all())
    assert relative_error(got, want) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_transpose_of_the_layer(backend: str) -> None:
    """<targets, layer with down D> = <cross(targets), D>."""
    case = replace(SMALL, masked=0.0)
    inputs, experts, targets = make_inputs(case), make_experts(case), targets_of(case)
    out = rk.observe_layer(inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts)
    got = cross(case, inputs, experts, targets, backend)
    left, right = float((targets * out).sum()), float((got * experts.down).sum())
    assert abs(left - right) <= 1e-5 * float(targets.norm() * out.norm())


BAD = {
    "tokens": (ShapeError, "topk_ids has 4 tokens and hidden 3", {"topk_ids": [[0, 1]] * 4}),
    "targets-shape": (ShapeError, r"targets has shape \(3, 7\)", {"targets": torch.ones(3, 7)}),
    "targets-dtype": (DtypeError, "targets is torch.int64", {"targets": torch.ones(3, 8).long()}),
    "out-shape": (ShapeError, r"out has shape \(2, 4, 8\)", {"out": torch.zeros(2, 4, 8)}),
    "out-dtype": (DtypeError, "out torch.float64", {"out": torch.zeros(2, 8, 4).double()}),
    "out-device": (DtypeError, "out is on meta", {"out": torch.zeros(2, 8, 4, device="meta")}),
    "mask": (ShapeError, "mask has shape", {"mask": torch.ones(4, dtype=torch.bool)}),
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_do_not_fit_are_refused(name: str) -> None:
    error, mentions, changes = BAD[name]
    case = Case("small", "of a refusal", tokens=3, experts=2, hidden=8, intermediate=4)
    ids = torch.tensor(changes.get("topk_ids", [[0, 1]] * 3))
    given = {
        "hidden": torch.ones(3, 8),
        "topk_ids": ids,
        "topk_weights": torch.ones(ids.shape),
        "experts": make_experts(case),
        "targets": torch.ones(3, 8),
        "out": torch.zeros(2, 8, 4),
    }
    with pytest.raises(error, match=mentions):
        rk.cross(**{**given, **changes, "topk_ids": ids})


def test_a_scratch_budget_splits_a_call(monkeypatch) -> None:
    inputs, experts, targets = make_inputs(SMALL), make_experts(SMALL), targets_of(SMALL)
    seen = []
    sort = gpu.sort_slots

    def seeing(ids: Tensor, *rest: object) -> SortedSlots:
        seen.append(len(ids))
        return sort(ids, *rest)

    monkeypatch.setattr(gpu, "sort_slots", seeing)
    token = SMALL.top_k * (SMALL.intermediate * 4 + gpu._SLOT_BYTES)
    monkeypatch.setenv("REAP_SCRATCH_BYTES", str(10 * token))
    got = cross(SMALL, inputs, experts, targets, "triton")
    assert seen == [8, 8, 8]
    assert relative_error(got, truth(SMALL, inputs, experts, targets)) <= 1e-6


def test_double_precision_is_refused_by_kernels() -> None:
    inputs, experts = make_inputs(SMALL, torch.float64), make_experts(SMALL, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="float64 is served by `reference` only"):
        cross(SMALL, inputs, experts, targets_of(SMALL), "triton")
