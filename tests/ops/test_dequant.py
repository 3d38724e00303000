"""Quantized experts: what their codes mean, the op that dequantizes them, and layers fed by them.

Every comparison is of bits. The meaning of a code is written here once more, in Python numbers.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import reap_kernels as rk
from reap_kernels import dequant, env, scratch
from reap_kernels.dispatch import Request
from reap_kernels.errors import BackendUnavailable, DtypeError, ShapeError
from reap_kernels.experts import gpu as experts_gpu
from reap_kernels.layer.triton_backend import grouped_limits
from reap_kernels.quantized import FORMATS
from reap_kernels.testing import (
    CASES,
    make_inputs,
    make_quantized,
    make_quantized_experts,
)

needs_host = pytest.mark.skipif(
    env.cuda_host() is None, reason="csrc is not compiled for the CPU (make host)"
)
CUDA = pytest.param("cuda", marks=needs_host)
NAN = float("nan")
POISON = -7.0


def bf16(value: float) -> float:
    """`value`, a float32 or exact number, to the nearest bf16, ties to even; by arithmetic."""
    if math.isnan(value) or math.isinf(value) or value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, -126)
    unit = math.ldexp(1.0, exponent - 7)
    rounded = round(abs(value) / unit) * unit  # Python rounds ties to even
    return math.copysign(math.inf if rounded >= 2.0**128 else rounded, value)


def float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()


def e4m3(code: int) -> float:
    sign, exponent, mantissa = (-1.0) ** (code >> 7), (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return NAN
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def e8m0(code: int) -> float:
    return NAN if code == 255 else 2.0 ** (code - 127)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


def defined(matrices: rk.Quantized) -> list[list[list[float]]]:
    """[E][N][K] bf16 values, element by element."""
    experts, rows, columns = matrices.shape
    values = matrices.values
    if matrices.format == "fp8_block":
        values = values.view(torch.uint8)
    values, scales = values.tolist(), matrices.scales.double().tolist()
    if matrices.format == "mxfp4":
        scales = matrices.scales.tolist()
    high, wide = matrices.scale_block

    def element(e: int, n: int, k: int) -> float:
        scale = scales[e][n // high][k // wide]
        if matrices.format == "fp8_block":
            code = e4m3(values[e][n][k])
        elif matrices.format == "mxfp4":
            code, scale = E2M1[values[e][n][k // 2] >> 4 * (k % 2) & 15], e8m0(scale)
        else:
            code = float((values[e][n][k // 8] >> 4 * (k % 8) & 15) - 8)
        return bf16(float32(code * scale))

    return [
        [[element(e, n, k) for k in range(columns)] for n in range(rows)] for e in range(experts)
    ]


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal bits, but for NaN, of which there are many."""
    nan = want.isnan()
    bits = got.view(torch.int16).where(~nan, 0), want.view(torch.int16).where(~nan, 0)
    return torch.equal(got.isnan(), nan) and torch.equal(*bits)


def every_code(name: str, scales: torch.dtype) -> rk.Quantized:
    """Every code under scales from the smallest to the largest."""
    if name == "fp8_block":
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        factors = torch.tensor([2.0**-140, 1e-30, 0.3, -1.7, 1.0, 3e36, math.inf, NAN])
        values = codes.expand(1, 8, 256).contiguous()
        return rk.Quantized(values, factors.view(1, 8, 1).to(scales), name, (1, 256))
    if name == "mxfp4":
        pairs = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(1, 32, 256)
        every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(1, 2, 1)
        # 16 groups per row, each of 16 of the 256 pairs: the second half of rows pairs them anew.
        values = torch.cat([pairs[:, :16], pairs[:, 16:].roll(16 * 7 + 3, dims=2)], dim=1)
        return rk.Quantized(values.contiguous(), every.contiguous(), name)
    words = [0x76543210, 0xFEDCBA98 - (1 << 32), 0x13579BDF, -1, 0, -0x80000000]
    values = torch.tensor(words, dtype=torch.int32).view(1, 1, 6).repeat(1, 4, 1)
    small = 2.0**-24 if scales == torch.float16 else 2.0**-133
    large = 65504.0 if scales == torch.float16 else 3e38
    factors = torch.tensor([small, 0.3, -1.7, large]).view(1, 4, 1).repeat(1, 1, 2)
    return rk.Quantized(values, factors.to(scales), name)


EVERY = [(name, dtype) for name, (_, _, scaled) in FORMATS.items() for dtype in scaled]


@pytest.mark.parametrize("backend", ["reference", CUDA])
@pytest.mark.parametrize(("name", "scales"), EVERY, ids=str)
def test_every_code_means_what_its_format_says(name, scales, backend) -> None:
    made = every_code(name, scales)
    got = rk.dequantize(made, backend=backend)
    assert got.dtype == torch.bfloat16
    assert same_bits(got, torch.tensor(defined(made), dtype=torch.float64).bfloat16())


def test_the_definitions_agree_with_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(
        torch.tensor([e4m3(code) for code in range(256)]),
        codes.view(torch.float8_e4m3fn).float(),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    numbers = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 2.0**-130
    numbers = [*numbers.tolist(), 1.00390625, 1.01171875, 3.4e38, -0.0, 2.0**-134]
    want = torch.tensor(numbers).bfloat16().double().tolist()
    assert [bf16(number) for number in numbers] == want


# N and K that no block divides; rows that do not begin at whole words; one element.
SHAPES = {
    "fp8_block": [(3, 5, 264), (2, 129, 130), (2, 3, 77), (1, 1, 1)],
    "mxfp4": [(3, 5, 96), (2, 67, 160)],
    "int4_group": [(3, 5, 96), (2, 67, 160)],
}


@needs_host
@pytest.mark.parametrize(("name", "scales"), EVERY, ids=str)
def test_kernels_give_the_bits_of_the_reference(name, scales) -> None:
    for seed, sizes in enumerate(SHAPES[name]):
        made = make_quantized(name, *sizes, scales=scales, seed=seed)
        want = rk.dequantize(made, backend="reference")
        assert same_bits(want, torch.stack(list(made)))
        assert same_bits(rk.dequantize(made, backend="cuda"), want), sizes


@pytest.mark.parametrize("backend", ["reference", CUDA])
@pytest.mark.parametrize("block", [(1, 128), (64, 16), (2, 4), (4, 256), (128, 1)])
def test_fp8_blocks_of_any_power_of_two(block, backend) -> None:
    made = make_quantized("fp8_block", 2, 9, 72, block=block)
    want = torch.tensor(defined(made), dtype=torch.float64).bfloat16()
    assert same_bits(rk.dequantize(made, backend=backend), want)


@pytest.mark.parametrize("backend", ["reference", CUDA])
@pytest.mark.parametrize("group", [8, 24, 32, 128, 384])
def test_groups_of_any_whole_number_of_words(group, backend) -> None:
    made = make_quantized("int4_group", 2, 3, 384, group=group)
    want = torch.tensor(defined(made), dtype=torch.float64).bfloat16()
    assert same_bits(rk.dequantize(made, backend=backend), want)


@needs_host
@pytest.mark.parametrize(
    ("name", "rows", "columns", "group"),
    [("fp8_block", 3, 5, 0), ("fp8_block", 3, 8, 0), ("mxfp4", 1, 32, 0), ("int4_group", 3, 24, 8)],
)
def test_a_part_may_begin_anywhere(name, rows, columns, group) -> None:
    made = make_quantized(name, 5, rows, columns, group=group)
    for first, last in ((0, 2), (1, 2), (1, 4), (3, 5)):
        got = rk.dequantize(made.part(first, last), backend="cuda")
        assert same_bits(got, torch.stack(made[first:last]))


@needs_host
@pytest.mark.parametrize("name", FORMATS)
def test_experts_without_rows_are_not_written(name: str) -> None:
    made = make_quantized(name, 5, 33, 96)
    offsets = torch.tensor([0, 0, 3, 3, 4, 4])
    out = torch.full(made.shape, POISON, dtype=torch.bfloat16)
    assert rk.dequantize(made, offsets=offsets, out=out, backend="cuda") is out
    for expert in range(5):
        served = offsets[expert] < offsets[expert + 1]
        assert same_bits(out[expert], made[expert] if served else torch.full_like(out[0], POISON))


@needs_host
def test_the_order_of_threads_changes_nothing() -> None:
    from reap_kernels import cuda

    module = cuda.host_module(env.cuda_host())
    made = make_quantized("int4_group", 2, 70, 96)
    want = rk.dequantize(made, backend="cuda")
    module.set_order(seed=3)
    try:
        assert torch.equal(rk.dequantize(made, backend="cuda"), want)
    finally:
        module.set_order(seed=0)


def test_a_sequence_of_matrices_and_its_parts() -> None:
    made = make_quantized("mxfp4", 4, 3, 64)
    assert len(made) == 4
    assert made.shape == (4, 3, 64)
    assert made.dtype == torch.bfloat16
    whole = torch.stack(list(made))
    assert torch.equal(torch.stack(made[1:3]), whole[1:3])
    assert torch.equal(made[-1], whole[3])
    part = made.part(1, 3)
    assert part.values.data_ptr() == made.values[1].data_ptr()
    assert torch.equal(rk.dequantize(part), whole[1:3])
    with pytest.raises(IndexError):
        made[4]


FP8 = torch.zeros(2, 200, 130).to(torch.float8_e4m3fn)
BAD = {
    "format": (DtypeError, "'fp6' is not known", (FP8, torch.ones(2, 2, 2), "fp6")),
    "values dtype": (DtypeError, "values is torch.float32", (FP8.float(), torch.ones(2, 2, 2))),
    "scales dtype": (DtypeError, "scales is torch.float64", (FP8, torch.ones(2, 2, 2).double())),
    "rank": (ShapeError, r"blocks.flatten\(2\)", (FP8[0], torch.ones(2, 2, 2))),
    "strides": (ShapeError, "contiguous", (FP8.transpose(1, 2), torch.ones(2, 2, 2))),
    "scales": (ShapeError, r"need \(2, 2, 2\)", (FP8, torch.ones(2, 2, 1))),
    "empty": (ShapeError, "empty", (FP8[:, :0], torch.ones(2, 0, 2))),
    "block": (
        ShapeError,
        r"block is \(96, 128\)",
        (FP8, torch.ones(2, 3, 2), "fp8_block", (96, 128)),
    ),
    "device": (DtypeError, "move one", (FP8, torch.ones(2, 2, 2, device="meta"))),
    "mx columns": (
        ShapeError,
        "K = 48; mxfp4 needs a multiple of 32",
        (torch.zeros(2, 3, 24).byte(), torch.zeros(2, 3, 1).byte(), "mxfp4"),
    ),
    "groups": (
        ShapeError,
        "5 groups per row of K = 32",
        (torch.zeros(2, 3, 4).int(), torch.ones(2, 3, 5), "int4_group"),
    ),
    "no groups": (
        ShapeError,
        "0 groups",
        (torch.zeros(2, 3, 4).int(), torch.ones(2, 3, 0), "int4_group"),
    ),
    "group of half a word": (
        ShapeError,
        "8 groups per row of K = 32",
        (torch.zeros(2, 3, 4).int(), torch.ones(2, 3, 8), "int4_group"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_quantized_refuses(name: str) -> None:
    error, mentions, arguments = BAD[name]
    values, scales, *rest = arguments
    with pytest.raises(error, match=mentions):
        rk.Quantized(values, scales, *(rest or ["fp8_block"]))


MADE = make_quantized("int4_group", 2, 3, 32)
BAD_CALLS = {
    "offsets shape": (ShapeError, r"offsets has shape \(2,\)", {"offsets": torch.zeros(2).long()}),
    "offsets dtype": (DtypeError, "offsets is torch.int32", {"offsets": torch.zeros(3).int()}),
    "out shape": (ShapeError, "out has shape", {"out": torch.empty(2, 3, 31).bfloat16()}),
    "out strides": (ShapeError, "strides", {"out": torch.empty(2, 32, 3).bfloat16().mT}),
    "out dtype": (DtypeError, "out is torch.float32", {"out": torch.empty(2, 3, 32)}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_dequantize_refuses(name: str) -> None:
    error, mentions, arguments = BAD_CALLS[name]
    with pytest.raises(error, match=mentions):
        rk.dequantize(MADE, **arguments)


@needs_host
def test_kernels_refuse_addresses_they_cannot_store_to() -> None:
    room = torch.empty(2 * 3 * 32 + 1, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match=r"out begins 2 bytes past .* pass out.clone\(\)"):
        rk.dequantize(MADE, out=room[1:].view(2, 3, 32), backend="cuda")
    shifted = torch.zeros(2 * 3 * 16 + 2, dtype=torch.uint8)[2:].view(2, 3, 16)
    codes = rk.Quantized(shifted, torch.zeros(2, 3, 1, dtype=torch.uint8), "mxfp4")
    with pytest.raises(ShapeError, match=r"values begins 2 bytes past a multiple of 4"):
        rk.dequantize(codes, backend="cuda")


def test_kernels_refuse_what_they_cannot_count(monkeypatch) -> None:
    from reap_kernels.dequant import cuda_backend

    monkeypatch.setattr(cuda_backend.cuda, "refusal", lambda where: None)
    request = Request("dequant", torch.device("cpu"), torch.bfloat16)
    assert cuda_backend.limits(request) is None
    many = request._replace(sizes=request.sizes._replace(experts=65536))
    assert "65536 experts" in cuda_backend.limits(many)
    large = request._replace(sizes=request.sizes._replace(hidden=1 << 16, intermediate=1 << 15))
    assert "2^31" in cuda_backend.limits(large)


CASE = replace(
    CASES[-1], tokens=14, experts=5, top_k=3, hidden=64, intermediate=32, foreign=0.1, groups=2
)
LAYOUTS = ("stacked", "interleaved-biased", "blocks", "ungated")


def layer(name: str, layout: str = "stacked", kind: str = "silu"):
    """Quantized experts of `CASE`, and the same dequantized beforehand."""
    kind = "relu2" if layout == "ungated" else kind
    activation = rk.Activation(kind, limit=0.7) if kind != "opaque" else opaque()
    experts = make_quantized_experts(CASE, name, layout, activation)

    def dense(matrices):
        return None if matrices is None else torch.stack(list(matrices))

    plain = {part: dense(getattr(experts, part)) for part in ("up", "gate", "down")}
    return experts, replace(experts, **plain)


def opaque() -> rk.Activation:
    def own(projected: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    return rk.Activation("opaque", fn=own)


def observe(experts: rk.ExpertWeights, backend: str, skip: int | None = None):
    """Output and statistics; no token goes to expert `skip`."""
    inputs = make_inputs(CASE, torch.bfloat16)
    ids = inputs.topk_ids if skip is None else inputs.topk_ids.where(inputs.topk_ids != skip, -1)
    stats = rk.LayerStats(CASE.experts, CASE.groups)
    out = rk.observe_layer(
        inputs.hidden,
        ids,
        inputs.topk_weights,
        experts,
        stats,
        mask=inputs.mask,
        group=inputs.group,
        backend=backend,
    )
    return out, stats


def assert_same(one, other) -> None:
    assert one[0].isfinite().all()
    assert torch.equal(one[0], other[0])
    for name in rk.stats.FIELDS:
        assert torch.equal(one[1].fields()[name], other[1].fields()[name]), name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_layers_read_quantized_experts(name: str, layout: str, backend: str) -> None:
    experts, plain = layer(name, layout)
    assert (experts.layout, plain.layout) == ("quantized", "stacked")
    assert experts.dtype == torch.bfloat16
    assert_same(observe(experts, backend), observe(plain, backend))


# Every format, every layout and the opaque gate, in as few interpreted calls as show them.
GPU_LAYERS = [
    ("fp8_block", "stacked", "silu"),
    ("mxfp4", "interleaved-biased", "swiglu_oai"),
    ("int4_group", "blocks", "silu"),
    ("mxfp4", "ungated", "relu2"),
    ("int4_group", "stacked", "opaque"),
    ("fp8_block", "blocks", "opaque"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "layout", "kind"), GPU_LAYERS)
def test_chunks_of_experts_change_no_bit(monkeypatch, name, layout, kind) -> None:
    experts, plain = layer(name, layout, kind)
    want = observe(plain, "triton", skip=3)
    for step in (1, 2, CASE.experts) if layout == "stacked" and kind == "silu" else (2,):
        seen = []
        monkeypatch.setattr(experts_gpu, "fitting", lambda *_, **__: step)  # noqa: B023
        chosen = experts_gpu.chosen_dequantize
        monkeypatch.setattr(
            experts_gpu,
            "chosen_dequantize",
            lambda m: lambda part, *rest: seen.append(len(part)) or chosen(m)(part, *rest),  # noqa: B023
        )
        assert_same(observe(experts, "triton", skip=3), want)
        monkeypatch.undo()
        assert max(seen) == step
        matrices = 2 if experts.gate is None else 3
        assert sum(seen) == matrices * CASE.experts


@needs_host
@pytest.mark.usefixtures("poisoned")
def test_layers_by_compiled_kernels_read_quantized_experts(monkeypatch) -> None:
    """Experts without rows stay poisoned in the scratch, and nobody reads them."""
    monkeypatch.setenv("REAP_BACKEND", "layer=cuda,dequant=cuda")
    experts, plain = layer("mxfp4", "interleaved-biased")
    assert_same(observe(experts, None, skip=3), observe(plain, None, skip=3))


def test_expert_outputs_of_quantized_experts(monkeypatch) -> None:
    monkeypatch.setattr(experts_gpu, "fitting", lambda *_, **__: 2)
    experts, plain = layer("fp8_block", "interleaved-biased")
    inputs = make_inputs(CASE, torch.bfloat16)
    routing = rk.sort_by_expert(inputs.topk_ids, CASE.experts, topk_weights=inputs.topk_weights)
    found = [
        rk.expert_outputs(inputs.hidden, routing, some, backend="triton")
        for some in (experts, plain)
    ]
    assert torch.equal(*found)


def test_scratch_of_experts_keeps_to_its_quarter_of_the_budget(monkeypatch) -> None:
    experts, _ = layer("fp8_block")
    wanted = []
    empty = torch.empty

    def recorded(*size, **options):
        if len(size) == 3 and options.get("dtype") == torch.bfloat16:
            wanted.append(2 * math.prod(size))
        return empty(*size, **options)

    each = 2 * math.prod(experts.up.shape[1:])
    monkeypatch.setenv("REAP_SCRATCH_BYTES", str(4 * 2 * each))
    monkeypatch.setattr(experts_gpu.torch, "empty", recorded)
    observe(experts, "triton")
    # Parts are equal: 5 experts, 2 at a time; all 5 of the down product, which is half as large.
    assert sorted(set(wanted)) == [4 * each // 2 * 3 // 4, 2 * each]
    assert scratch.fitting(5, each, torch.device("cpu"), quarters=1) == 2


def test_the_gpu_layer_dequantizes_by_what_was_asked_for(monkeypatch) -> None:
    experts, _ = layer("fp8_block")
    monkeypatch.setenv("REAP_BACKEND", "triton")  # which `dequant` has not: automatic choice
    assert dequant.op.chosen(experts.up) is dequant.reference.dequantize
    monkeypatch.setenv("REAP_BACKEND", "dequant=cuda")
    monkeypatch.delenv("REAP_CUDA_HOST", raising=False)
    with pytest.raises(BackendUnavailable, match="inputs are on the CPU"):
        dequant.op.chosen(experts.up)


def test_all_matrices_are_quantized_alike_or_none() -> None:
    experts, plain = layer("fp8_block", "blocks")
    with pytest.raises(DtypeError, match=r"up, gate and down are .* not quantized"):
        replace(experts, gate=plain.gate)
    other, _ = layer("mxfp4", "blocks")
    with pytest.raises(DtypeError, match=r"fp8_block in blocks of \(128, 128\), mxfp4"):
        replace(experts, gate=other.gate)
    with pytest.raises(DtypeError, match="dtypes"):
        replace(experts, down_bias=torch.zeros(CASE.experts, CASE.hidden))
    inputs = make_inputs(CASE)
    with pytest.raises(DtypeError, match=r"hidden is torch\.float32"):
        rk.observe_layer(inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts)


def test_grouped_mm_says_who_serves_quantized_experts(monkeypatch) -> None:
    request = Request("layer", torch.device("cpu"), torch.bfloat16, "silu", layout="quantized")
    assert "`triton` dequantizes experts by chunks" in grouped_limits(request)
    experts, _ = layer("fp8_block")
    with pytest.raises(BackendUnavailable, match="reads bf16 weights"):
        observe(experts, "grouped_mm")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    notes = {(v.op, v.backend): v.note for v in rk.explain("cpu", layout="quantized")}
    assert "by chunks" in notes["layer", "triton"]
    assert "by chunks" in notes["experts", "triton"]


def flat_arguments(experts: rk.ExpertWeights, backend: str) -> tuple:
    """Arguments of the operator as `observe_layer` gives them."""
    inputs = make_inputs(CASE, torch.bfloat16)

    def flat(matrices: rk.Quantized | None) -> list[torch.Tensor]:
        return [] if matrices is None else [matrices.values.view(torch.uint8), matrices.scales]

    return (
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        flat(experts.up),
        flat(experts.gate),
        flat(experts.down),
        experts.up_bias,
        experts.gate_bias,
        experts.down_bias,
        experts.activation.kind,
        None,
        1.702,
        experts.interleaved,
        rk.LayerStats(CASE.experts, CASE.groups).packed(),
        inputs.mask,
        0,
        inputs.group,
        None,
        rk.LayerGram(CASE.experts, CASE.intermediate).packed(),
        1.0,
        None,
        backend,
        experts.down.format,
        *experts.down.block,
    )


@pytest.mark.parametrize("name", FORMATS)
def test_opcheck(name: str) -> None:
    experts, _ = layer(name, "blocks")
    result = torch.library.opcheck(
        torch.ops.reap_kernels.observe_layer.default, flat_arguments(experts, "cpu")
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", FORMATS)
def test_compiles_without_a_graph_break(name: str) -> None:
    experts, _ = layer(name, "interleaved-biased")
    inputs = make_inputs(CASE, torch.bfloat16)

    def call(hidden: torch.Tensor) -> torch.Tensor:
        return 2 * rk.observe_layer(hidden, inputs.topk_ids, inputs.topk_weights, experts)

    fast = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(fast(inputs.hidden), call(inputs.hidden))


def test_makers_draw_every_code_and_about_the_spread_asked_for() -> None:
    for name, std in itertools.product(FORMATS, (1.0, 0.02)):
        dense = rk.dequantize(make_quantized(name, 2, 64, 512, std=std)).float()
        assert 0.6 * std < dense.std() < 1.6 * std
        assert dense.isfinite().all()
