"""The grouped product that reads FP8 codes, in Triton's interpreter, against float64.

The truth here is the exact code times its scale: `Quantized` rounds that to bf16, and so does the
path that dequantizes. A launch table of small tiles makes every case several tiles and blocks of
scales; a GPU's launches, `python -m bench aot` compiles.
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
from reap_kernels.sort.gpu import sort_slots
from reap_kernels.testing import (
    ACTIVATIONS,
    CASES,
    LAYOUTS,
    Case,
    make_experts,
    make_inputs,
    make_quantized,
    make_quantized_experts,
    relative_error,
)
from reap_kernels.tuning import FP8, Entry, Launch, Table
from tests.gpu.fp8 import exact
from tests.ops.test_backends import BF16_CASES, VARIANT, check, meet, observe

CPU = torch.device("cpu")
POINTER = Launch(16, 32, 16, 2, 4, 2)
BLOCKS = ((128, 128), (32, 16), (16, 64), (128, 32))
SIZES = ((144, 136), (80, 72), (128, 64), (160, 136))


def lines(backend: str) -> tuple[Entry, ...]:
    products = (Entry(op, "half", None, None, POINTER) for op in ("gate_up", "down"))
    return (*products, Entry("quantized", "half", None, None, backend=backend))


def use(backend: str, tmp_path: Path, monkeypatch) -> None:
    """A launch table that says how products read quantized experts."""
    path = tmp_path / f"{backend}.json"
    Table("interpreter", "a test", lines(backend)).save(path)
    monkeypatch.setenv("REAP_TUNING", str(path))


@pytest.fixture(autouse=True)
def no_self_check(monkeypatch) -> None:
    """Its layers have several blocks of scales: slow when interpreted, so that one test runs it."""
    monkeypatch.setattr(selfcheck, "verdict", lambda *_: None)


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch) -> None:
    use("product", tmp_path, monkeypatch)


@pytest.fixture
def launched(monkeypatch) -> list[bool]:
    """Whether each product of codes gathered its rows."""
    found = []
    launch = product._of_codes

    def seen(call: Any) -> None:
        assert call.launch.kernel == FP8
        found.append(call.gather)
        launch(call)

    monkeypatch.setattr(product, "_of_codes", seen)
    return found


def error(case: Case, experts: rk.ExpertWeights) -> float:
    """Relative error of the products' output, to exact weights in float64."""
    inputs = make_inputs(case, torch.bfloat16)
    out, _ = observe(case, experts, inputs, "triton")
    doubled = replace(
        inputs, hidden=inputs.hidden.double(), topk_weights=inputs.topk_weights.double()
    )
    want, _ = observe(case, exact(experts), doubled, "reference")
    return relative_error(out, want)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case, launched: list[bool]) -> None:
    """Output to exact weights; statistics to rounded ones, as the reference has them."""
    experts = make_quantized_experts(case, "fp8_block", block=(32, 16))
    assert error(case, experts) <= 5e-3
    if case.tokens:
        assert {*launched} == {True, False}, "it did not serve both products"
    if case in BF16_CASES:
        inputs = make_inputs(case, torch.bfloat16)
        check(case, experts, inputs, "triton", sums=2e-2, output=7e-3)


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
    """Halves that begin within a block of scales, biases, a gate of its own, no gate."""
    experts = make_quantized_experts(VARIANT, "fp8_block", layout, activation, block=(16, 16))
    assert error(VARIANT, experts) <= 5e-3
    assert launched == [True, False]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("block", "sizes"), [*zip(BLOCKS, SIZES, strict=True)])
def test_blocks_of_scales(block: tuple[int, int], sizes: tuple[int, int], launched) -> None:
    """H and I that leave over parts of blocks, or none."""
    case = replace(VARIANT, hidden=sizes[0], intermediate=sizes[1])
    experts = make_quantized_experts(case, "fp8_block", "interleaved-biased", block=block)
    assert error(case, experts) <= 5e-3
    assert launched == [True, False]


def test_an_opaque_activation(launched: list[bool]) -> None:
    own = rk.Activation("opaque", fn=rk.Activation("silu").apply)
    for layout, products in (("stacked", [True, False]), ("blocks", [True, True, False])):
        experts = make_quantized_experts(VARIANT, "fp8_block", layout, own, block=(16, 16))
        # The first product is rounded before the activation, as eager models round it.
        assert error(VARIANT, experts) <= 8e-3
        assert launched == products
        launched.clear()


def product_of(matrices: rk.Quantized, a: torch.Tensor) -> torch.Tensor:
    """a [T, K] times the only expert's matrix, transposed: [T, N] in bf16."""
    ids = torch.zeros(len(a), 1, dtype=torch.int64)
    rows = sort_slots(ids, torch.ones(len(a), 1), 1)
    launch = replace(POINTER, kernel=FP8)
    return product.product(a, Operand.of(matrices, None), rows, launch, gather=True)


def test_every_code_is_read_exactly() -> None:
    """Each of 254 numbers, subnormal ones and -0 among them, by rows of the identity."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)
    values = torch.zeros(1, len(codes), 16).to(torch.float8_e4m3fn)
    values[0, :, 3] = codes
    matrices = rk.Quantized(values, torch.full((1, 2, 1), 0.5), "fp8_block")
    got = product_of(matrices, torch.eye(16, dtype=torch.bfloat16))
    want = torch.zeros(16, len(codes), dtype=torch.bfloat16)
    want[3] = (codes.double() * 0.5).to(torch.bfloat16)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_either_dtype(dtype: torch.dtype) -> None:
    matrices = make_quantized("fp8_block", 1, 40, 80, scales=dtype, block=(32, 32))
    a = torch.randn(7, 80, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    scales = matrices.scales.double().repeat_interleave(32, 1).repeat_interleave(32, 2)
    want = a.double() @ (matrices.values.double() * scales[:, :40, :80])[0].T
    assert relative_error(product_of(matrices, a), want) <= 2.5e-3


def test_closer_than_dequantized_weights(tmp_path: Path, monkeypatch) -> None:
    """Dequantizing rounds every weight to bf16, with scales that are no powers of two."""
    case = replace(VARIANT, tokens=48, hidden=160, intermediate=96)
    experts = make_quantized_experts(case, "fp8_block", block=(32, 32))
    read = error(case, experts)
    use("dequantize", tmp_path, monkeypatch)
    rounded = error(case, experts)
    print(f"products of codes {read:.2e}, of dequantized weights {rounded:.2e}")
    assert read < 0.95 * rounded


def test_equal_bits_run_to_run_and_in_parts() -> None:
    experts = make_quantized_experts(VARIANT, "fp8_block", block=(16, 16))
    inputs = make_inputs(VARIANT, torch.bfloat16)
    routed = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts)
    whole = rk.observe_layer(*routed, backend="triton")
    assert torch.equal(whole, rk.observe_layer(*routed, backend="triton"))
    assert torch.equal(whole, rk.observe_layer(*routed, backend="triton", chunk=7))


def test_no_scratch_for_experts(monkeypatch) -> None:
    """Nothing is dequantized, and the whole budget is for tokens."""
    experts = make_quantized_experts(VARIANT, "fp8_block", block=(16, 16))
    asked = []
    monkeypatch.setattr(gpu, "chosen_dequantize", lambda _: pytest.fail("it dequantizes"))
    fitting = scratch.fitting
    monkeypatch.setattr(
        "reap_kernels.layer.call.fitting",
        lambda *args: asked.append(args[3]) or fitting(*args),
    )
    observe(VARIANT, experts, make_inputs(VARIANT, torch.bfloat16), "triton")
    assert asked == [4]


def request(**facts: object) -> Request:
    facts = {"layout": "quantized", "block": (128, 128), **facts}
    sizes = Sizes(24, 3, 5, 56, 40)
    return Request("layer", CPU, torch.bfloat16, "silu", sizes)._replace(**facts)


def test_what_keeps_dequantizing(tmp_path: Path, monkeypatch) -> None:
    """Other formats, narrow blocks and older GPUs, with the reason; all where the table says so."""
    assert triton_backend.note(request()).startswith("products read FP8 codes")
    for facts, told in (
        ({"block": None}, "chunks: products read the format fp8_block alone"),
        ({"block": (128, 8)}, "chunks: products read blocks of 16 columns or more, not of 8"),
    ):
        assert triton_backend.note(request(**facts)).endswith(told)
        assert not triton_backend.reads_codes(request(**facts))
        assert triton_backend.launches(request(**facts)).up == POINTER
    for arch, served in (("sm80", False), ("sm89", True), ("sm120", True), ("gfx942", False)):
        with monkeypatch.context() as patched:
            patched.setattr(device, "architecture", lambda _: arch)  # noqa: B023
            assert (triton_backend.code_limits(request()) is None) == served
    for experts in (
        make_quantized_experts(VARIANT, "fp8_block", block=(8, 8)),
        make_quantized_experts(replace(VARIANT, hidden=64, intermediate=32), "mxfp4"),
    ):
        case = replace(VARIANT, hidden=experts.hidden_size, intermediate=experts.intermediate_size)
        check(case, experts, make_inputs(case, torch.bfloat16), "triton", sums=1e-2, output=5e-3)
    use("dequantize", tmp_path, monkeypatch)
    assert triton_backend.note(request()) == "experts are dequantized to bf16 by chunks"
    assert triton_backend.launches(request()).up == POINTER


def test_explain_says_how_experts_are_read() -> None:
    for quantized, told in (("fp8_block", "products read FP8"), ("mxfp4", "fp8_block alone")):
        notes = {(v.op, v.backend): v.note for v in rk.explain("cpu", quantized=quantized)}
        assert told in notes["layer", "triton"]
        assert told in notes["experts", "triton"]


def test_launches_leave_registers_for_a_block_of_k() -> None:
    wide = Launch(128, 256, 64, 16, 8, 3)
    assert triton_backend.for_codes(wide, 128, gated=False).block_n == 128
    gated = triton_backend.for_codes(replace(wide, block_n=128), 32, gated=True)
    assert (gated.block_n, gated.block_k, gated.kernel) == (64, 32, FP8)
    assert triton_backend.for_codes(wide, 128, gated=True, plain=False).block_n == 32


def test_the_self_check_reads_codes(launched: list[bool]) -> None:
    for facts in ({"biased": True}, {"activation": "relu2"}, {"activation": "opaque"}):
        launched.clear()
        assert triton_backend.check(request(**facts, block=(32, 32))) is None
        assert launched == [True, False]
    assert triton_backend.facts(request()) != triton_backend.facts(request(block=(32, 32)))


def test_a_check_of_its_own_for_each_order_of_halves() -> None:
    """The distance of an operand's rows in their matrix is compiled into the kernel."""
    seen = set()
    for boxes, interleaved in (("fused", False), ("apart", False), ("interleaved", True)):
        for biased in (False, True):
            asked = request(boxes=boxes, biased=biased, block=(32, 32))
            _, experts = triton_backend.check_layer(asked)
            up, gate = gpu.halves(experts)
            steps = {up.block_scales().step, gate.block_scales().step}
            assert steps == {2 if interleaved else 1}
            assert experts.biased == biased
            seen.add(str(triton_backend.facts(asked)))
    assert len(seen) == 4


def test_other_operands_are_refused() -> None:
    up = make_experts(VARIANT, dtype=torch.bfloat16).up
    rows = sort_slots(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), VARIANT.experts)
    a = torch.zeros(4, VARIANT.hidden, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match=r"reads fp8_block experts, not torch\.bfloat16"):
        product.product(a, Operand.of(up, None), rows, replace(POINTER, kernel=FP8), gather=True)
