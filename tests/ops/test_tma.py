"""The grouped product by TMA, in Triton's interpreter: what it computes, and what it leaves to the
kernel that reads through pointers.

Bounds are those of `test_backends`. A launch table of three programs and small tiles makes each
program compute several tiles; a GPU's launches, `python -m bench aot` compiles.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import reap_kernels as rk
from reap_kernels import device, scratch, selfcheck
from reap_kernels.dispatch import Request, Sizes
from reap_kernels.errors import BackendUnavailable
from reap_kernels.experts import gpu, product, triton_backend
from reap_kernels.experts.operands import Operand
from reap_kernels.experts.request import request_of
from reap_kernels.sort.gpu import sort_slots
from reap_kernels.testing import (
    ACTIVATIONS,
    CASES,
    LAYOUTS,
    Case,
    make_experts,
    make_inputs,
    make_quantized_experts,
    relative_error,
)
from reap_kernels.tuning import Entry, Launch, Table
from tests.ops.test_backends import HALF, VARIANT, check, meet, observe

CPU = torch.device("cpu")
TMA = Launch(16, 32, 16, 2, 4, 2, kernel="tma")
POINTER = replace(TMA, kernel="pointer")


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch) -> None:
    """A launch table of the TMA kernel for every call, and of the other where that cannot read."""
    entries = [
        Entry(op, dtype, None, None, launch)
        for op in ("gate_up", "down")
        for dtype in ("half", "float32")
        for launch in (TMA, POINTER)
    ]
    Table("interpreter", "a test", tuple(entries)).save(tmp_path / "tma.json")
    monkeypatch.setenv("REAP_TUNING", str(tmp_path / "tma.json"))


@pytest.fixture
def launched(monkeypatch) -> list[bool]:
    """Whether each product gathered its rows, of those that TMA served."""
    found = []
    launch = product._by_boxes

    def seen(call: Any) -> None:
        found.append(call.gather)
        launch(call)

    monkeypatch.setattr(product, "_by_boxes", seen)
    return found


# A case changes rows and sizes, and a dtype the operands alone: one case of 16 bits has it all. It
# has also what matters to no product: masks, groups and weights of 0.
COMBINATIONS = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}")
    for case in CASES
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if case.name == "everything"
    or (dtype == torch.float32 and case.name not in ("masked", "groups", "zero-weights"))
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("case", "dtype"), COMBINATIONS)
def test_cases(case: Case, dtype: torch.dtype, launched: list[bool]) -> None:
    inputs, experts = make_inputs(case, dtype), make_experts(case, dtype=dtype)
    half = dtype in HALF
    output = 5e-3 if half else 1e-6
    check(case, experts, inputs, "triton", sums=1e-2 if half else 1e-6, output=output)
    if case.name != "odd-sizes" and case.tokens:
        assert {*launched} == {True, False}, "it did not serve both products"
    else:
        assert not launched


def sizes_for_tma(case: Case) -> Case:
    """The case with H and I that leave over parts of tiles, in multiples of 16 bytes."""
    return replace(case, hidden=56, intermediate=40)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("layout", "activation"),
    [
        pytest.param(layout, activation, id=f"{layout}-{activation.kind}")
        for layout in LAYOUTS
        for activation in ACTIVATIONS
        if meet(layout, activation, "triton")
    ],
)
def test_layouts_and_formulas(layout: str, activation: rk.Activation, launched: list[bool]) -> None:
    """Either kernel serves; TMA where the rule says that it can read, which no product refuses."""
    case = sizes_for_tma(VARIANT)
    inputs, experts = make_inputs(case), make_experts(case, layout, activation)
    check(case, experts, inputs, "triton", sums=1e-6, output=1e-6)
    read = layout in ("stacked", "interleaved-biased", "ungated")
    assert bool(launched) == read
    request = Request(
        "layer",
        CPU,
        torch.float32,
        activation.kind,
        Sizes(24, 3, 5, 56, 40),
        experts.layout,
        experts.biased,
        boxes="" if not read else "interleaved" if experts.interleaved else "fused",
    )
    note = triton_backend.note(request)
    assert note.startswith("products by TMA" if read else "products by pointers: TMA reads ")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("biased", "interleaved"), [(False, True), (True, False)])
def test_halves_of_either_order(biased: bool, interleaved: bool, launched: list[bool]) -> None:
    """The two combinations that no layout above has."""
    case = sizes_for_tma(VARIANT)
    experts = make_experts(case, "interleaved-biased")
    experts = replace(experts, interleaved=interleaved)
    if not biased:
        experts = replace(experts, up_bias=None, down_bias=None)
    check(case, experts, make_inputs(case), "triton", sums=1e-6, output=1e-6)
    assert launched


def test_an_opaque_activation(launched: list[bool]) -> None:
    case = sizes_for_tma(VARIANT)
    experts = make_experts(case, activation=rk.Activation("opaque", fn=rk.Activation("silu").apply))
    check(case, experts, make_inputs(case), "triton", sums=1e-6, output=1e-6)
    assert launched


@pytest.mark.usefixtures("poisoned")
def test_every_number_of_rows_and_of_tiles(launched: list[bool]) -> None:
    """From fewer tiles than programs to many more; columns and depth below one tile too."""
    for tokens, hidden, inner in ((1, 8, 4), (33, 36, 68), (60, 68, 36)):
        case = replace(CASES[0], tokens=tokens, experts=5, hidden=hidden, intermediate=inner)
        check(case, make_experts(case), make_inputs(case), "triton", sums=1e-6, output=1e-6)
    assert len(launched) >= 6


def test_the_same_bits_run_to_run() -> None:
    case = sizes_for_tma(VARIANT)
    inputs, experts = make_inputs(case, torch.float16), make_experts(case, dtype=torch.float16)
    (first, one), (second, two) = (observe(case, experts, inputs, "triton") for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(one.sums, two.sums)


def test_quantized_experts_by_chunks(launched: list[bool], monkeypatch) -> None:
    """The same bits as of experts that were dequantized beforehand, two chunks of one expert."""
    case = replace(CASES[0], tokens=6, experts=2, top_k=1, hidden=32, intermediate=32)
    experts = make_quantized_experts(case, "fp8_block")
    plain = replace(experts, **{n: torch.stack(list(getattr(experts, n))) for n in ("up", "down")})
    inputs = make_inputs(case, torch.bfloat16)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights)
    want = rk.observe_layer(*call, plain, backend="triton")
    monkeypatch.setenv("REAP_SCRATCH_BYTES", "1")
    launched.clear()
    assert torch.equal(rk.observe_layer(*call, experts, chunk=6, backend="triton"), want)
    assert launched == [True, True, False, False]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layout": "table"}, "stacked in one tensor"),
        ({"sizes": Sizes(8, 2, 8, 33, 16)}, "multiples of 16 bytes; H is 33"),
        ({"sizes": Sizes(8, 2, 8, 32, 7)}, "multiples of 16 bytes; I is 7"),
        ({"boxes": ""}, "rows are contiguous"),
    ],
)
def test_what_it_cannot_read_is_said(change: dict, word: str) -> None:
    request = Request("layer", CPU, torch.float32, "silu", Sizes(8, 2, 8, 32, 16))
    assert triton_backend.note(request) == "products by TMA"
    request = request._replace(**change)
    assert word in triton_backend.tma_limits(request)
    # Sizes that are not aligned have tiles of their own, whatever the table says.
    assert ("sizes" in change) or word in triton_backend.note(request)
    chosen = triton_backend.launches(request)
    assert (chosen.up.kernel, chosen.down.kernel) == ("pointer", "pointer")


@pytest.mark.parametrize(
    ("arch", "there"),
    [("sm80", False), ("sm89", False), ("sm90", True), ("sm120", True), ("gfx942", False)],
)
def test_gpus_that_have_it(arch: str, there: bool, monkeypatch) -> None:
    monkeypatch.setattr(device, "architecture", lambda where: arch)
    request = Request("layer", torch.device("cuda"), torch.bfloat16, "silu")
    reason = triton_backend.tma_limits(request)
    assert reason is None if there else reason == f"TMA is there from sm_90 on, this is {arch}"


def test_operands_it_cannot_read_are_refused() -> None:
    """Where a caller names the kernel himself, before anything is launched."""
    case = sizes_for_tma(VARIANT)
    inputs = make_inputs(case)
    rows = sort_slots(inputs.topk_ids, inputs.topk_weights, case.experts)
    for layout in ("transposed", "per-expert", "blocks"):
        up, gate = gpu.halves(make_experts(case, layout))
        silu = rk.Activation("silu")
        with pytest.raises(BackendUnavailable, match="the TMA kernel cannot read"):
            product.product(inputs.hidden, up, rows, TMA, gate=gate, activation=silu, gather=True)
    # A gate and its up beside a third matrix: not at one distance.
    wide = torch.zeros(case.experts, case.intermediate, 3 * case.hidden)
    gate, up = (Operand.of(part, None) for part in wide.split(case.hidden, dim=2)[:2])
    with pytest.raises(BackendUnavailable, match="the TMA kernel cannot read"):
        product.product(inputs.hidden, up, rows, TMA, gate=gate, activation=silu, gather=True)
    down = Operand.of(make_experts(case).down, None)
    h = torch.zeros(len(rows.gather_index), case.intermediate + 1)[:, 1:]
    with pytest.raises(BackendUnavailable, match="rows of strides"):
        product.product(h, down, rows, TMA)


@pytest.mark.parametrize("name", ["up", "down"])
def test_one_matrix_for_all_experts_is_read_through_pointers(name: str, launched: list) -> None:
    """Its stride of 0 is none of a box; no call is refused for it, but a launch that is named."""
    case = sizes_for_tma(VARIANT)
    experts = make_experts(case)
    shared = getattr(experts, name)[:1].expand(case.experts, -1, -1)
    experts, inputs = replace(experts, **{name: shared}), make_inputs(case)
    assert request_of("layer", inputs.hidden, case.top_k, experts).boxes == "apart"
    check(case, experts, inputs, "triton", sums=1e-6, output=1e-6)
    assert not launched
    rows = sort_slots(inputs.topk_ids, inputs.topk_weights, case.experts)
    with pytest.raises(BackendUnavailable, match="all else above 0"):
        product.product(inputs.hidden, Operand.of(shared, None), rows, TMA, gather=True)


def test_rows_of_any_strides_are_gathered() -> None:
    case = sizes_for_tma(VARIANT)
    inputs, experts = make_inputs(case), make_experts(case)
    want, _ = observe(case, experts, inputs, "triton")
    spread = replace(inputs, hidden=inputs.hidden.T.contiguous().T)
    got, _ = observe(case, experts, spread, "triton")
    assert torch.equal(got, want)


def test_a_token_that_is_not_a_number_stays_alone() -> None:
    """Rows are read in blocks that pass their end, where the next token lies."""
    case = sizes_for_tma(VARIANT)
    inputs, experts = make_inputs(case), make_experts(case)
    want, _ = observe(case, experts, inputs, "triton")
    inputs.hidden[5] = torch.nan
    got, _ = observe(case, experts, inputs, "triton")
    assert torch.equal(got[:5], want[:5])
    assert torch.equal(got[6:], want[6:])


def test_a_check_of_its_own_for_each_order_of_halves(monkeypatch) -> None:
    """The kernel that serves is the kernel that was checked."""
    seen = []
    monkeypatch.setattr(selfcheck, "verdict", lambda op, where, facts, check: seen.append(facts))
    for boxes in ("fused", "interleaved"):
        for biased in (False, True):
            request = Request("layer", CPU, torch.float32, "silu", Sizes(8, 1, 8, 56, 40))
            request = request._replace(biased=biased, boxes=boxes)
            _, experts = triton_backend.check_layer(request)
            assert (experts.interleaved, experts.biased) == (boxes == "interleaved", biased)
            assert triton_backend.refusal(request) is None
            assert triton_backend.check(request) is None
    assert len({str(facts) for facts in seen}) == 4


def test_the_allocator_of_a_user_stays(monkeypatch) -> None:
    import triton
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    found = []

    def launch(first, *, second) -> None:
        found.append((_allocation._allocator.get(), first, second))

    scratch.launch_with_scratch(launch, 1, second=2)
    assert found == [(scratch._allocate, 1, 2)]
    assert _allocation._allocator.get() is before

    def broken() -> None:
        raise ValueError("a launch")

    with pytest.raises(ValueError, match="a launch"):
        scratch.launch_with_scratch(broken)
    assert _allocation._allocator.get() is before
    assert triton.set_allocator
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: real(n, dtype=dtype))
    assert scratch._allocate(640, 128, None).nbytes == 640


def test_programs_share_the_tiles(monkeypatch) -> None:
    """The result does not depend on how many programs there are."""
    case = sizes_for_tma(VARIANT)
    inputs, experts = make_inputs(case), make_experts(case)
    want = None
    for programs in (1, 132):
        monkeypatch.setattr(device, "multiprocessors", lambda where, n=programs: n)
        out, _ = observe(case, experts, inputs, "triton")
        want = out if want is None else want
        assert torch.equal(out, want)
    assert relative_error(out, observe(case, experts, inputs, "reference")[0]) <= 1e-6
