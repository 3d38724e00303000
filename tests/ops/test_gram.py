"""Gram matrices of inner activations, alone and within the layer op, against the formula.

The truth is computed here, slot by slot in float64. Errors are relative: of a Gram matrix to its
own norm, of a first moment to what the inequality of Cauchy and Schwarz allows it.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import reap_kernels as rk
from reap_kernels import selfcheck
from reap_kernels.dispatch import Request, Sizes, select
from reap_kernels.errors import BackendUnavailable, DtypeError, ShapeError, UsageError
from reap_kernels.gram import cpu as gram_cpu
from reap_kernels.gram import triton_backend
from reap_kernels.gram.kernel_triton import _lower_block
from reap_kernels.testing import (
    ACTIVATIONS,
    CASES,
    LAYOUTS,
    Case,
    Inputs,
    make_experts,
    make_inputs,
)

OP_BACKENDS = ["reference", "cpu", "triton"]
BACKENDS = [*OP_BACKENDS, "grouped_mm", "cuda"]
# Backends that compute in half precision round h, and once more what the Gram matrix is made of.
ROUNDED = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
SMALL = replace(CASES[-1], tokens=24, experts=5, top_k=3, hidden=40, intermediate=24)
WIDE = Case(
    "wide", "several block rows", tokens=40, experts=3, top_k=2, hidden=16, intermediate=200
)
ODD = replace(CASES[-1], name="odd", tokens=70, experts=3, top_k=2, hidden=9, intermediate=77)


def scales(case: Case) -> Tensor:
    """A factor of each token, some of them 0."""
    rng = torch.Generator().manual_seed(9)
    scale = torch.rand(case.tokens, generator=rng) * 3
    return scale.masked_fill(scale < 0.5, 0.0)


def poisoned_sums(case: Case) -> rk.LayerGram:
    """Sums whose upper triangles are NaN: nothing may read them."""
    sums = rk.LayerGram(case.experts, case.intermediate)
    sums.gram += torch.full(sums.gram.shape[1:], torch.nan).triu(1)
    return sums


def truth(case: Case, inputs: Inputs, experts: rk.ExpertWeights, scale=1.0) -> rk.LayerGram:
    """The sums by their formulas, as float64 in every field."""
    sums = rk.LayerGram(case.experts, case.intermediate)
    sums.gram = sums.gram.double()
    for token in range(case.tokens):
        s = float(scale[token]) if isinstance(scale, Tensor) else scale
        if s == 0 or (inputs.mask is not None and not inputs.mask[token]):
            continue
        x = inputs.hidden[token : token + 1].double()
        for expert, g in zip(
            inputs.topk_ids[token].tolist(), inputs.topk_weights[token].tolist(), strict=True
        ):
            if g == 0 or not 0 <= expert < case.experts:
                continue
            h = experts.inner(expert, x)[0]
            sums.gram[expert] += s * g**2 * torch.outer(h, h)
            sums.first[expert] += s * g**2 * h
            sums.weight[expert] += s * g**2
            sums.count[expert] += 1
    return sums


def assert_sums(got: rk.LayerGram, want: rk.LayerGram, bound: float) -> None:
    assert torch.equal(got.count, want.count)
    assert [tensor.dtype for tensor in got.packed()] == [
        torch.float32,
        torch.float64,
        torch.float64,
        torch.int64,
    ]
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-12, atol=0)
    for expert in range(want.num_experts):
        second, exact = got.second(expert), want.second(expert)
        assert float((second - exact).norm()) <= bound * float(exact.norm())
        most = float((want.weight[expert] * exact.trace()).sqrt())
        assert float((got.first[expert] - want.first[expert]).norm()) <= bound * most


def observe(
    case: Case, inputs: Inputs, experts: rk.ExpertWeights, backend: str, sums=None, **options
) -> tuple[Tensor, rk.LayerStats]:
    stats = rk.LayerStats(case.experts, case.groups)
    out = rk.observe_layer(
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        experts,
        stats,
        mask=inputs.mask,
        group=inputs.group,
        gram=sums,
        backend=backend,
        **options,
    )
    return out, stats


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for case, backend in itertools.product([*CASES, SMALL, WIDE], BACKENDS)
        # Their products and stages are others', the Gram matrices those of `triton`.
        if backend in OP_BACKENDS or case is SMALL
    ],
)
def test_a_layer_sums_the_formula_and_changes_nothing_else(case: Case, backend: str) -> None:
    inputs, experts, sums = make_inputs(case), make_experts(case), poisoned_sums(case)
    out, stats = observe(case, inputs, experts, backend, sums)
    plain, without = observe(case, inputs, experts, backend)
    assert torch.equal(out, plain)
    assert all(map(torch.equal, stats.packed(), without.packed()))
    assert_sums(sums, truth(case, inputs, experts), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    inputs, experts = make_inputs(SMALL, dtype), make_experts(SMALL, dtype=dtype)
    sums = poisoned_sums(SMALL)
    observe(SMALL, inputs, experts, backend, sums)
    bound = 1e-6 if backend in ("reference", "cpu") else ROUNDED[dtype]
    assert_sums(sums, truth(SMALL, inputs, experts), bound)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_double_precision(backend: str) -> None:
    """Its products are float64; what they add to is float32."""
    inputs, experts = make_inputs(SMALL, torch.float64), make_experts(SMALL, dtype=torch.float64)
    sums, want = poisoned_sums(SMALL), truth(SMALL, inputs, experts)
    observe(SMALL, inputs, experts, backend, sums)
    assert_sums(sums, want, 1e-7)
    torch.testing.assert_close(sums.first, want.first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", OP_BACKENDS)
def test_every_layout(layout: str, backend: str) -> None:
    inputs, sums = make_inputs(SMALL), poisoned_sums(SMALL)
    kinds = [a for a in ACTIVATIONS if (a.kind == "relu2") == (layout == "ungated")]
    experts = make_experts(SMALL, layout, kinds[-1])
    observe(SMALL, inputs, experts, backend, sums)
    assert_sums(sums, truth(SMALL, inputs, experts), 1e-6)


def split(case: Case, inputs: Inputs, experts: rk.ExpertWeights) -> tuple[Tensor, rk.Routing]:
    """Inner activations by sorted row as a host has them, NaN where no expert serves."""
    routing = rk.sort_by_expert(inputs.topk_ids, case.experts, topk_weights=inputs.topk_weights)
    h = torch.full((len(routing.gather_index), case.intermediate), torch.nan).to(inputs.hidden)
    for expert in range(case.experts):
        rows = slice(*routing.offsets[expert : expert + 2].tolist())
        h[rows] = experts.inner(expert, inputs.hidden[routing.gather_index[rows] // case.top_k])
    return h, routing


@pytest.mark.parametrize("case", [SMALL, WIDE, ODD], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", OP_BACKENDS)
def test_the_op_alone_sums_what_the_layer_does_and_leaves_its_input(
    case: Case, backend: str
) -> None:
    inputs, experts, scale = make_inputs(case), make_experts(case), scales(case)
    h, routing = split(case, inputs, experts)
    given, alone, within = h.clone(), poisoned_sums(case), poisoned_sums(case)
    rk.gram(
        h,
        routing,
        inputs.topk_weights,
        alone,
        mask=inputs.mask,
        scale=scale,
        backend=backend,
    )
    observe(case, inputs, experts, backend, within, gram_scale=scale)
    assert torch.equal(h.nan_to_num(7.0), given.nan_to_num(7.0))
    assert_sums(alone, truth(case, inputs, experts, scale), 1e-6)
    assert_sums(alone, within, 1e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's numpy, of the NaN rows
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count_may_hold_anything(backend: str) -> None:
    """NaN in tokens that are masked, of factor 0, or routed with weight 0."""
    case = replace(SMALL, masked=0.0, zero_weights=0.0)
    inputs, experts = make_inputs(case), make_experts(case)
    inputs.hidden[[2, 5, 11]] = torch.nan
    inputs.topk_weights[5] = 0.0
    mask, scale = torch.ones(case.tokens, dtype=torch.bool), torch.full((case.tokens,), 0.25)
    mask[2], scale[11] = False, 0.0
    inputs, sums = replace(inputs, mask=mask), poisoned_sums(case)
    observe(case, inputs, experts, backend, sums, gram_scale=scale)
    assert_sums(sums, truth(case, inputs, experts, scale), 1e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_counted_row_that_is_not_finite_shows(backend: str) -> None:
    case = replace(SMALL, masked=0.0, zero_weights=0.0, foreign=0.0)
    inputs, experts = make_inputs(case), make_experts(case)
    inputs.hidden[3] = torch.nan
    sums = rk.LayerGram(case.experts, case.intermediate)
    observe(case, inputs, experts, backend, sums)
    broken = [not bool(sums.second(expert).isfinite().all()) for expert in range(case.experts)]
    assert [i for i, bad in enumerate(broken) if bad] == sorted(inputs.topk_ids[3].tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_of_all_tokens_is_that_of_each(backend: str) -> None:
    inputs, experts = make_inputs(SMALL), make_experts(SMALL)
    one, each = poisoned_sums(SMALL), poisoned_sums(SMALL)
    observe(SMALL, inputs, experts, backend, one, gram_scale=0.3)
    factors = torch.full((SMALL.tokens,), 0.3, dtype=torch.float64)
    observe(SMALL, inputs, experts, backend, each, gram_scale=factors)
    assert_sums(one, each, 1e-6)
    assert_sums(one, truth(SMALL, inputs, experts, 0.3), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_run_to_run(backend: str) -> None:
    inputs, experts = make_inputs(WIDE), make_experts(WIDE)
    sums = [rk.LayerGram(WIDE.experts, WIDE.intermediate) for _ in range(2)]
    for own in sums:
        observe(WIDE, inputs, experts, backend, own)
    assert all(map(torch.equal, sums[0].packed(), sums[1].packed()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_add_up(backend: str) -> None:
    """Two halves of a batch, and merged sums of them, are the batch."""
    inputs, experts = make_inputs(SMALL), make_experts(SMALL)
    whole, halves = poisoned_sums(SMALL), [poisoned_sums(SMALL) for _ in range(3)]
    observe(SMALL, inputs, experts, backend, whole)
    for sums, part in zip(halves[:2], (slice(0, 10), slice(10, None)), strict=True):
        some = Inputs(
            inputs.hidden[part],
            inputs.topk_ids[part],
            inputs.topk_weights[part],
            inputs.mask[part],
            inputs.group[part],
        )
        observe(SMALL, some, experts, backend, sums)
        observe(SMALL, some, experts, backend, halves[2])
    assert_sums(halves[0].merge_(halves[1]), whole, 1e-6)
    assert_sums(halves[2], whole, 1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_only_blocks_that_reach_the_diagonal_are_computed(monkeypatch, backend: str) -> None:
    """What lies above them keeps its bits."""
    monkeypatch.setattr(gram_cpu, "_BLOCK", 50)
    inputs, experts = make_inputs(WIDE), make_experts(WIDE)
    sums = rk.LayerGram(WIDE.experts, WIDE.intermediate)
    observe(WIDE, inputs, experts, backend, sums)
    block = torch.arange(WIDE.intermediate) // (50 if backend == "cpu" else 64)
    above = block[None, :] > block[:, None]
    assert not bool(sums.gram[:, above].any())
    assert bool((sums.gram[:, ~above] != 0).all())


BAD = {
    "h-rows": (
        ShapeError,
        r"h has shape \(5, 4\); the routing has 6 rows",
        {"h": torch.ones(5, 4)},
    ),
    "h-ndim": (ShapeError, r"h has shape \(6,\)", {"h": torch.ones(6)}),
    "h-dtype": (DtypeError, "h is torch.int64", {"h": torch.ones(6, 4, dtype=torch.int64)}),
    "weights-shape": (
        ShapeError,
        r"router_weights has shape \(6, 1\); expected \(3, 2\)",
        {"router_weights": torch.ones(6, 1)},
    ),
    "weights-dtype": (
        DtypeError,
        "router_weights torch.int64",
        {"router_weights": torch.ones(3, 2, dtype=torch.int64)},
    ),
    "experts": (ShapeError, "hold 3 experts of 4", {"sums": rk.LayerGram(3, 4)}),
    "width": (ShapeError, "hold 2 experts of 5 neurons", {"sums": rk.LayerGram(2, 5)}),
    "mask": (ShapeError, "mask has shape", {"mask": torch.ones(4, dtype=torch.bool)}),
    "scale-negative": (UsageError, "scale is -1.0; give finite", {"scale": -1.0}),
    "scale-nan": (UsageError, "scale is nan", {"scale": float("nan")}),
    "scale-text": (UsageError, "scale is 'one'", {"scale": "one"}),
    "scale-shape": (ShapeError, r"scale has shape \(2,\)", {"scale": torch.ones(2)}),
    "scale-dtype": (DtypeError, "scale is torch.int64", {"scale": torch.ones(3).long()}),
    "scale-values": (UsageError, "scale has the value -2.0", {"scale": torch.tensor([1, -2.0, 1])}),
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_do_not_fit_are_refused(name: str) -> None:
    error, mentions, changes = BAD[name]
    given = {
        "h": torch.ones(6, 4),
        "routing": rk.sort_by_expert(torch.tensor([[0, 1]] * 3), 2),
        "router_weights": torch.ones(3, 2),
        "sums": rk.LayerGram(2, 4),
        **changes,
    }
    with pytest.raises(error, match=mentions):
        rk.gram(**given)


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"gram": rk.LayerGram(SMALL.experts, 7)}, "hold 5 experts of 7 neurons"),
        ({"gram_scale": -0.5}, "scale is -0.5"),
    ],
)
def test_a_layer_refuses_sums_that_do_not_fit(changes: dict, mentions: str) -> None:
    inputs, experts = make_inputs(SMALL), make_experts(SMALL)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts)
    with pytest.raises((ShapeError, UsageError), match=mentions):
        rk.observe_layer(*call, **{"gram": poisoned_sums(SMALL), **changes})


def test_parts_of_a_call_add_up_to_it() -> None:
    inputs, experts, scale = make_inputs(SMALL), make_experts(SMALL), scales(SMALL)
    for backend in ("triton", "grouped_mm", "cuda"):
        sums = poisoned_sums(SMALL)
        observe(SMALL, inputs, experts, backend, sums, gram_scale=scale, chunk=7)
        assert_sums(sums, truth(SMALL, inputs, experts, scale), 1e-6)


def test_gpu_kernels_that_fail_their_check_refuse_the_layer_with_gram_matrices_only(
    monkeypatch,
) -> None:
    request = Request("layer", torch.device("cpu"), torch.float32, "silu", Sizes(24, 3, 5, 40, 24))
    wrong = "its self-check gave wrong numbers: gram is off"
    monkeypatch.setattr(triton_backend, "check", lambda request: "gram is off")
    monkeypatch.setattr(selfcheck, "saved", dict)
    monkeypatch.setattr(selfcheck, "_save", lambda key, reason: None)
    selfcheck.forget()
    try:
        for backend in ("triton", "grouped_mm", "cuda"):
            assert select(request, backend).name == backend
            with pytest.raises(BackendUnavailable, match=wrong):
                select(request._replace(gram=True), backend)
    finally:
        selfcheck.forget()


@pytest.mark.parametrize("row", [0, 1, 2, 90, 1023, 4094])
def test_blocks_of_the_lower_triangle_are_found_by_number(row: int) -> None:
    """At both ends of a row, where a rounded root could miss it."""
    first = row * (row + 1) // 2
    for block, column in ((first, 0), (first + row, row)):
        found = torch.zeros(2, dtype=torch.int32)
        _located[(1,)](found, block)
        assert found.tolist() == [row, column]


@triton.jit
def _located(out_ptr, block):
    row, column = _lower_block(block)
    tl.store(out_ptr, row)
    tl.store(out_ptr + 1, column)
