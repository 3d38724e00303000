"""The Triton backend beyond its results: chunks, refusals, precision, what it says of itself."""

from dataclasses import replace

import pytest
import torch

import reap_kernels as rk
from reap_kernels import cuda, device, scratch
from reap_kernels.dispatch import Request, Sizes, _ranked
from reap_kernels.errors import BackendUnavailable, ShapeError
from reap_kernels.layer import gpu
from reap_kernels.layer.triton_backend import grouped_limits
from reap_kernels.sort import gpu as sort
from reap_kernels.sort import reference as sort_reference
from reap_kernels.testing import (
    CASES,
    ROUTING_CASES,
    largest_relative_error,
    make_experts,
    make_inputs,
)
from tests import interpreter

CASE = replace(CASES[-1], tokens=24, experts=6, top_k=3, hidden=40, intermediate=24)


def observe(case=CASE, experts=None, whole=False, **options):
    """One observed call on the Triton backend, unless told otherwise; `whole` rounds its input."""
    inputs = make_inputs(case)
    if whole:
        inputs = replace(inputs, hidden=inputs.hidden.round())
    stats = rk.LayerStats(case.experts, case.groups)
    out = rk.observe_layer(
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        experts or make_experts(case),
        stats,
        mask=inputs.mask,
        group=inputs.group,
        **{"backend": "triton", **options},
    )
    return out, stats


def whole_numbers() -> rk.ExpertWeights:
    """Experts whose products are exact: the interpreter's, numpy's, have bits that depend on a
    row's place in its tile, which those of tensor cores do not.
    """
    experts = make_experts(CASE, "ungated")
    return replace(experts, up=experts.up.sign(), up_bias=None, down=experts.down.sign())


@pytest.mark.parametrize("name", ["one-token", "everything", "many-experts"])
def test_ranks_are_the_same_counted_in_any_pieces(name: str, monkeypatch) -> None:
    """In those of the library, in those of all other tests, and in one."""
    (case,) = (case for case in ROUTING_CASES if case.name == name)
    inputs = make_inputs(case)
    truth = sort_reference.sort_by_expert(inputs.topk_ids, inputs.topk_weights, case.experts)
    for chunk in (interpreter.SORT_CHUNK, sort._CHUNK, sort._BLOCK):
        monkeypatch.setattr(sort, "_CHUNK", chunk)
        found = sort.sort_by_expert(inputs.topk_ids, inputs.topk_weights, case.experts)
        assert torch.equal(found.gather_index, truth.gather_index)
        assert torch.equal(found.offsets, truth.offsets)


@pytest.mark.parametrize("backend", ["triton", "grouped_mm"])
def test_chunks_change_no_output_and_hardly_a_sum(backend: str) -> None:
    whole, stats = observe(experts=whole_numbers(), whole=True, backend=backend)
    for chunk in (11, 1000):  # two and a rest; more than there are tokens
        parts, other = observe(experts=whole_numbers(), whole=True, backend=backend, chunk=chunk)
        assert torch.equal(whole, parts)
        assert torch.equal(stats.counts, other.counts)
        assert torch.equal(stats.tokens, other.tokens)
        assert torch.equal(stats.extrema, other.extrema)
        assert largest_relative_error(other.sums, stats.sums) <= 1e-12


def test_scratch_budget_splits_a_call(monkeypatch) -> None:
    case = replace(CASE, tokens=25)
    whole, stats = observe(case, whole_numbers(), whole=True)
    token = CASE.top_k * ((CASE.hidden + CASE.intermediate) * 4 + gpu.SLOT_BYTES)
    monkeypatch.setenv("REAP_SCRATCH_BYTES", str(13 * token))
    assert scratch.fitting(case.tokens, token, torch.device("cpu")) == 13
    seen = []
    compute = gpu._observe_part

    def seeing(kernels, part, out):
        seen.append(len(part.hidden))
        compute(kernels, part, out)

    monkeypatch.setattr(gpu, "_observe_part", seeing)
    parts, other = observe(case, whole_numbers(), whole=True)
    assert seen == [13, 12]
    assert torch.equal(whole, parts)
    assert largest_relative_error(other.sums, stats.sums) <= 1e-12


@pytest.mark.parametrize("value", ["4GB", "0", "-1"])
def test_scratch_budget_must_be_a_number(monkeypatch, value: str) -> None:
    monkeypatch.setenv("REAP_SCRATCH_BYTES", value)
    with pytest.raises(BackendUnavailable, match=f"REAP_SCRATCH_BYTES='{value}' is not"):
        observe()


def test_a_token_is_never_split(monkeypatch) -> None:
    monkeypatch.setenv("REAP_SCRATCH_BYTES", "1")
    assert scratch.fitting(10, 1000, torch.device("cpu")) == 1


def test_chunk_must_be_positive() -> None:
    with pytest.raises(ShapeError, match="chunk is 0"):
        observe(chunk=0)


def test_explicit_backends_refuse_and_say_why(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match=r"TRITON_INTERPRET=1"):
        observe()
    monkeypatch.setattr(device, "triton_version", lambda: None)
    with pytest.raises(BackendUnavailable, match=r"Triton is not installed \(pip install"):
        observe()
    monkeypatch.setattr(device, "triton_version", lambda: "3.5.1")
    with pytest.raises(BackendUnavailable, match=r"Triton 3\.5\.1 is older than 3\.6"):
        observe()


def test_gpus_that_cannot_serve_are_named(monkeypatch) -> None:
    """Absent or too old, for every GPU backend alike; another device is asked anew."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(cuda, "module", lambda: "not built")
    device._too_old.cache_clear()
    try:
        for available, reason in (
            (False, "sees no such device"),
            (True, "capability 7.5 is below"),
        ):
            monkeypatch.setattr(torch.cuda, "is_available", lambda there=available: there)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
            where = torch.device("cuda", int(available))
            assert reason in device.triton_refusal(where)
            assert reason in cuda.refusal(where)
    finally:
        device._too_old.cache_clear()


def test_experts_of_different_strides_are_refused() -> None:
    experts = make_experts(CASE, "per-expert")
    down = [m.T.contiguous().T if i == 2 else m for i, m in enumerate(experts.down)]
    mixed = replace(experts, down=down)
    assert (experts.layout, mixed.layout) == ("table", "mixed")
    with pytest.raises(BackendUnavailable, match="differ in strides"):
        observe(experts=mixed)
    out, _ = observe(experts=mixed, backend=None)  # automatic choice goes on to another
    torch.testing.assert_close(out, observe(experts=experts, backend="reference")[0])


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"layout": "table"}, "stacked in one tensor"),
        ({"biased": True}, "adds no bias"),
        ({"activation": "opaque"}, "opaque activation"),
        ({"sizes": Sizes(hidden=2044)}, "hidden is 2044"),
    ],
)
def test_grouped_mm_says_why_it_refuses(facts: dict, reason: str) -> None:
    request = Request("layer", torch.device("cpu"), torch.float32, "silu")
    assert grouped_limits(request) is None
    assert reason in grouped_limits(request._replace(**facts))


@pytest.mark.parametrize(
    ("arch", "dtype", "reason"),
    [
        ("sm80", torch.bfloat16, "loops over experts on sm80"),
        ("sm90", torch.float16, "fast for bfloat16 only"),
        ("sm90", torch.bfloat16, None),
    ],
)
def test_grouped_mm_serves_gpus_it_is_fast_on(monkeypatch, arch, dtype, reason) -> None:
    monkeypatch.setattr(device, "architecture", lambda where: arch)
    found = grouped_limits(Request("layer", torch.device("cuda"), dtype, "silu"))
    assert (found is None) if reason is None else (reason in found)


def test_explain_says_what_becomes_of_an_unknown_gate(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("REAP_CUDA_HOST")
    notes = {
        (v.op, v.backend): v.note for v in rk.explain("cpu", torch.float32, activation="opaque")
    }
    assert "between the two products" in notes["layer", "triton"]
    assert all(v.note == "" for v in rk.explain("cpu", torch.float32))


def test_order_of_choice(monkeypatch) -> None:
    """On a GPU the CUDA kernels come first where they are built, then Triton, or grouped_mm where a
    launch table says so; on the CPU last.
    """

    def first(where: str, sizes: Sizes) -> list[str]:
        request = Request("layer", torch.device(where), torch.bfloat16, "silu", sizes)
        return [backend.name for backend in _ranked(request)]

    assert first("cpu", Sizes()) == ["cpu", "triton", "grouped_mm", "cuda", "reference", "wgmma"]
    monkeypatch.setattr(device, "architecture", lambda where: "sm90")
    monkeypatch.setattr(device, "triton_refusal", lambda where: None)
    monkeypatch.setattr(cuda, "module", lambda: "not built")
    assert first("cuda", Sizes())[:2] == ["triton", "grouped_mm"]  # Qwen3-30B-A3B
    wide = Sizes(16384, 2, 8, 4096, 14336)  # Mixtral
    assert first("cuda", wide)[:2] == ["grouped_mm", "triton"]
    assert first("cuda", wide._replace(tokens=512))[:2] == ["triton", "grouped_mm"]
    monkeypatch.setattr(cuda, "refusal", lambda where: None)
    assert first("cuda", Sizes())[:3] == ["cuda", "triton", "grouped_mm"]


def test_tf32_only_where_torch_was_asked() -> None:
    from reap_kernels.experts import product as experts

    assert experts.precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert experts.precision(torch.float32) == "tf32"
        assert experts.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert experts.precision(torch.float32) == "ieee"


def test_address_tables_are_made_once_and_never_stale() -> None:
    from reap_kernels.experts.operands import Operand

    matrices = [torch.randn(4, 8) for _ in range(3)]
    first = Operand.of(matrices, None)
    assert Operand.of(list(matrices), None).base is first.base
    assert first.base.tolist() == [m.data_ptr() for m in matrices]
    moved = [matrices[0], matrices[1], torch.randn(4, 8)]
    assert Operand.of(moved, None).base.tolist() == [m.data_ptr() for m in moved]


def test_ids_of_any_integer_dtype_and_strided_inputs() -> None:
    inputs, experts = make_inputs(CASE), make_experts(CASE)
    want = rk.observe_layer(
        inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, backend="reference"
    )
    spread = torch.empty(CASE.hidden, CASE.tokens).T.copy_(inputs.hidden)
    for dtype in (torch.int32, torch.int16):
        got = rk.observe_layer(
            spread, inputs.topk_ids.to(dtype), inputs.topk_weights, experts, backend="triton"
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_router_weights_may_be_wider_than_the_model() -> None:
    inputs = make_inputs(CASE, torch.float16)
    experts = make_experts(CASE, dtype=torch.float16)
    found = []
    for backend in ("triton", "reference"):
        stats = rk.LayerStats(CASE.experts)
        call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights.float() + 1e-5, experts, stats)
        rk.observe_layer(*call, backend=backend)
        found.append(stats.router_weight_sum)
    assert largest_relative_error(found[0], found[1]) <= 1e-15
