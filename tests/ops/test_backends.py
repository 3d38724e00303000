"""Every fast backend against the float64 reference, on every case, layout, activation and dtype.

Bounds: float32 arithmetic 1e-6 for every sum; native half precision 1e-3 (kernels round the
intermediate activation to the model's dtype, as eager models do), which a few rows reach five times
over: sums of squares of an expert with one row carry twice its rounding. `triton` and `grouped_mm`
run in Triton's interpreter here; what a compiler makes of them, `python -m bench aot` shows.
"""

import itertools
from dataclasses import replace

import pytest
import torch

import reap_kernels as rk
from reap_kernels.errors import BackendUnavailable
from reap_kernels.testing import (
    ACTIVATIONS,
    CASES,
    LAYOUTS,
    ROUTING_CASES,
    Case,
    largest_relative_error,
    make_experts,
    make_inputs,
    relative_error,
)

HALF = (torch.bfloat16, torch.float16)
BACKENDS = ["cpu", "triton", "grouped_mm", "cuda"]
OPS_BACKENDS = ["cpu", "triton", "cuda"]
BF16_CASES = [case for case in CASES if case.name in ("plain", "odd-sizes", "everything")]
FULL_LAYOUTS = ("stacked", "interleaved-biased")
# Small enough for an interpreter, and still several tiles, skew, foreign ids, a mask and groups.
VARIANT = replace(CASES[-1], tokens=24, experts=5, top_k=3, hidden=40, intermediate=24, groups=2)


def observe(case, experts, inputs, backend, stats=True):
    collected = rk.LayerStats(case.experts, case.groups) if stats else None
    out = rk.observe_layer(
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        experts,
        collected,
        mask=inputs.mask,
        group=inputs.group,
        backend=backend,
    )
    return out, collected


def check(case, experts, inputs, backend, sums: float, output: float) -> None:
    out, stats = observe(case, experts, inputs, backend)
    want_out, want = observe(case, experts, inputs, "reference")
    assert out.dtype == inputs.hidden.dtype
    assert out.shape == inputs.hidden.shape
    assert relative_error(out, want_out) <= output
    for name in (*rk.stats.COUNTS, "tokens"):
        assert torch.equal(stats.fields()[name], want.fields()[name]), name
    for name in rk.stats.SUMS:
        assert largest_relative_error(stats.fields()[name], want.fields()[name]) <= sums, name
    used = want.count > 0
    for name in rk.stats.EXTREMA:
        got, reference = stats.fields()[name], want.fields()[name]
        assert torch.equal(got[~used], reference[~used]), name
        torch.testing.assert_close(got[used], reference[used], rtol=10 * output, atol=10 * output)


def refusal(case: Case, dtype: torch.dtype, backend: str) -> str | None:
    """Why a backend must refuse a case, or None."""
    if backend != "cpu" and dtype == torch.float64:
        return "float64 is served by `reference` only"
    if backend == "grouped_mm" and (case.hidden % 8 or case.intermediate % 8):
        return "multiples of 8"
    return None


def covered(case: Case, dtype: torch.dtype, backend: str) -> bool:
    """Whether a combination can show what no other one does. Interpreted, bf16 differs from fp16 in
    nothing that a case could show; in half precision `grouped_mm` and `cuda` take torch's or
    Triton's products, and stages that `triton` or test_cuda.py has in full.
    """
    if backend == "cpu" or case in BF16_CASES:
        return True
    return dtype != torch.bfloat16 and not (backend != "triton" and dtype in HALF)


COMBINATIONS = [
    pytest.param(case, dtype, backend, id=f"{case.name}-{dtype}-{backend}")
    for case, dtype, backend in itertools.product(
        CASES, (torch.float32, torch.float64, *HALF), BACKENDS
    )
    if covered(case, dtype, backend)
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("case", "dtype", "backend"), [c for c in COMBINATIONS if refusal(*c.values) is None]
)
def test_cases(case: Case, dtype: torch.dtype, backend: str) -> None:
    output = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 5e-3)
    inputs, experts = make_inputs(case, dtype), make_experts(case, dtype=dtype)
    # The CPU backend computes half precision in float32, the others in their own dtype.
    rounds = backend != "cpu" and dtype in HALF
    # grouped_mm rounds the first product too.
    factor = 1.6 if rounds and backend == "grouped_mm" else 1.0
    sums = 1e-2 if rounds else 1e-6
    check(case, experts, inputs, backend, sums=factor * sums, output=factor * output)


@pytest.mark.parametrize(
    ("case", "dtype", "backend"), [c for c in COMBINATIONS if refusal(*c.values)]
)
def test_refused_cases(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs, experts = make_inputs(case, dtype), make_experts(case, dtype=dtype)
    with pytest.raises(BackendUnavailable, match=refusal(case, dtype, backend)):
        observe(case, experts, inputs, backend)


def meet(layout: str, activation: rk.Activation, backend: str) -> bool:
    """Whether a layout and an activation belong together and show something by this backend."""
    if (activation.kind == "relu2") != (layout == "ungated"):
        return False  # relu2 is the one activation without a gate half
    if backend == "cuda":  # stages around the products know neither
        return layout in FULL_LAYOUTS and activation.kind == "silu"
    # Operands and formulas meet in no code of a kernel: a row and a column suffice.
    return backend == "cpu" or activation.kind in ("silu", "relu2") or layout in FULL_LAYOUTS


VARIANTS = [
    pytest.param(layout, activation, backend, id=f"{layout}-{activation.kind}-{backend}")
    for layout, activation, backend in itertools.product(LAYOUTS, ACTIVATIONS, BACKENDS)
    if meet(layout, activation, backend)
]


def takes(layout: str, activation: rk.Activation, backend: str) -> bool:
    """Whether a backend takes a layout, rather than refuse it."""
    experts = make_experts(VARIANT, layout)
    return backend != "grouped_mm" or (experts.layout == "stacked" and not experts.biased)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("layout", "activation", "backend"),
    [v for v in VARIANTS if takes(*v.values)],
)
def test_layouts_and_formulas(layout: str, activation: rk.Activation, backend: str) -> None:
    inputs, experts = make_inputs(VARIANT), make_experts(VARIANT, layout, activation)
    check(VARIANT, experts, inputs, backend, sums=1e-6, output=1e-6)


@pytest.mark.parametrize(
    ("layout", "activation", "backend"),
    [v for v in VARIANTS if not takes(*v.values)],
)
def test_refused_layouts(layout: str, activation: rk.Activation, backend: str) -> None:
    inputs, experts = make_inputs(VARIANT), make_experts(VARIANT, layout, activation)
    with pytest.raises(BackendUnavailable, match=r"adds no bias|stacked in one"):
        observe(VARIANT, experts, inputs, backend)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_native_half_precision(monkeypatch, dtype: torch.dtype) -> None:
    """The path CPUs with matrix instructions take; torch emulates it elsewhere."""
    monkeypatch.setenv("REAP_CPU_DTYPE", "native")
    case = Case("native", "rounding averages out", tokens=1024, hidden=256, intermediate=128)
    inputs, experts = make_inputs(case, dtype), make_experts(case, dtype=dtype)
    check(case, experts, inputs, "cpu", sums=1e-3, output=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_run_to_run_and_without_statistics(backend: str) -> None:
    case = VARIANT
    inputs, experts = make_inputs(case), make_experts(case)
    first, one = observe(case, experts, inputs, backend)
    again, two = observe(case, experts, inputs, backend)
    plain, _ = observe(case, experts, inputs, backend, stats=False)
    assert torch.equal(first, again)
    assert torch.equal(first, plain)
    for name in rk.stats.FIELDS:
        assert torch.equal(one.fields()[name], two.fields()[name]), name


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's numpy, of the NaN row
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nonfinite_rows_are_counted_apart(backend: str) -> None:
    """A NaN token reaches `nonfinite` of its experts and no other field."""
    case = replace(CASES[0], tokens=16)
    inputs = make_inputs(case)
    experts = make_experts(case, activation=rk.Activation("silu_clamped_in", limit=0.7))
    broken = inputs.hidden.clone()
    broken[5] = float("nan")  # clamps of the activation must not hide it
    _, stats = observe(case, experts, replace(inputs, hidden=broken), backend)
    mask = torch.ones(case.tokens, dtype=torch.bool)
    mask[5] = False
    _, clean = observe(case, experts, replace(inputs, mask=mask), backend)
    assert int(stats.nonfinite.sum()) == case.top_k
    assert set(stats.nonfinite[0].nonzero().flatten().tolist()) == set(inputs.topk_ids[5].tolist())
    for name in (*rk.stats.SUMS, *rk.stats.EXTREMA, "count"):
        torch.testing.assert_close(stats.fields()[name], clean.fields()[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_masked_tokens_are_still_computed(backend: str) -> None:
    case = next(case for case in CASES if case.name == "masked")
    inputs, experts = make_inputs(case), make_experts(case)
    out, stats = observe(case, experts, inputs, backend)
    unmasked, _ = observe(case, experts, replace(inputs, mask=None), backend)
    assert torch.equal(out, unmasked)
    assert int(stats.tokens.sum()) == int(inputs.mask.sum())


@pytest.mark.parametrize("backend", OPS_BACKENDS)
def test_routing_is_stable_and_complete(backend: str) -> None:
    for case in dict.fromkeys((*CASES, *ROUTING_CASES)):
        inputs = make_inputs(case)
        got = rk.sort_by_expert(
            inputs.topk_ids, case.experts, topk_weights=inputs.topk_weights, backend=backend
        )
        want = rk.sort_by_expert(
            inputs.topk_ids, case.experts, topk_weights=inputs.topk_weights, backend="reference"
        )
        assert torch.equal(got.gather_index, want.gather_index), case.name
        assert torch.equal(got.offsets, want.offsets), case.name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_expert_outputs_match_reference(backend: str) -> None:
    for case in CASES:
        inputs, experts = make_inputs(case), make_experts(case)
        routing = rk.sort_by_expert(inputs.topk_ids, case.experts, topk_weights=inputs.topk_weights)
        got = rk.expert_outputs(inputs.hidden, routing, experts, backend=backend)
        want = rk.expert_outputs(inputs.hidden, routing, experts, backend="reference")
        assert relative_error(got, want) <= 1e-6, case.name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", OPS_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulate_takes_rows_in_any_order(backend: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(2)
    y = torch.randn(300, 24, generator=rng).to(dtype)
    ids = torch.randint(-1, 9, (300,), generator=rng)
    router_weights = torch.rand(300, generator=rng)
    router_weights[::7] = 0
    mask = torch.rand(300, generator=rng) > 0.2
    group = torch.randint(0, 2, (300,), generator=rng)
    got, want, shuffled = (rk.LayerStats(8, 2) for _ in range(3))
    rk.accumulate(y, ids, router_weights, got, mask=mask, group=group, backend=backend)
    rk.accumulate(y, ids, router_weights, want, mask=mask, group=group, backend="reference")
    mix = torch.randperm(300, generator=rng)
    mixed = {"mask": mask[mix], "group": group[mix], "backend": backend}
    rk.accumulate(y[mix], ids[mix], router_weights[mix], shuffled, **mixed)
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.tokens, torch.zeros(2, dtype=torch.int64))
    for name in rk.stats.SUMS:
        assert largest_relative_error(got.fields()[name], want.fields()[name]) <= 1e-6
        assert largest_relative_error(shuffled.fields()[name], got.fields()[name]) <= 1e-12
    for name in rk.stats.EXTREMA:
        assert torch.equal(got.fields()[name], want.fields()[name])


@pytest.mark.parametrize("backend", OPS_BACKENDS)
def test_opaque_gate_runs_between_the_products(backend: str) -> None:
    case = VARIANT
    inputs = make_inputs(case)
    named = make_experts(case, activation=rk.Activation("gelu_tanh"))

    def own(projected):
        gate, up = projected.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    opaque = make_experts(case, activation=rk.Activation("opaque", fn=own))
    out, stats = observe(case, named, inputs, backend)
    same, other = observe(case, opaque, inputs, backend)
    # On the CPU both run the same torch function; a kernel's own rounds otherwise.
    bound = 0 if backend == "cpu" else 1e-6
    assert relative_error(same, out) <= bound
    for name in rk.stats.SUMS:
        assert largest_relative_error(other.fields()[name], stats.fields()[name]) <= bound


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_are_counted_by_group(backend: str, masked: bool) -> None:
    case = replace(VARIANT, masked=0.4 if masked else 0.0)
    inputs, experts = make_inputs(case), make_experts(case)
    _, stats = observe(case, experts, inputs, backend)
    counted = inputs.group if inputs.mask is None else inputs.group[inputs.mask]
    assert torch.equal(stats.tokens, torch.bincount(counted, minlength=case.groups))
