"""The CUDA products for Hopper, run on the CPU by the emulation of `csrc/host`, against float64.

`tests/csrc` holds what the emulation sees of races; here are the formulas, layouts and refusals.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reap_kernels as rk
from reap_kernels import cuda, env
from reap_kernels.errors import BackendUnavailable, KernelError
from reap_kernels.experts import kernel_cuda as products
from reap_kernels.experts.kernel_cuda import Half
from reap_kernels.experts.tables import Tables
from reap_kernels.sort import kernel_cuda as route
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.testing import ACTIVATIONS, Case, make_experts, make_inputs, relative_error

CPU = torch.device("cpu")
# What rounding the results costs, and sums of products in float32 with it.
BOUNDS = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
# Widths that fill no tile; experts of 0, few and more than a tile of rows.
SIZES = Case("sizes", "multiples of 8 alone", 60, 5, 2, 136, 72, "zipf", foreign=0.2)
SKEWED = Case("skewed", "tiles of every width, most experts empty", 300, 4, 2, 72, 40, "one")


def routed(case: Case, dtype: torch.dtype) -> tuple[Tensor, SortedSlots]:
    inputs = make_inputs(case, dtype)
    return inputs.hidden, route.sort_slots(inputs.topk_ids, inputs.topk_weights, case.experts)


def each_expert(rows: SortedSlots):
    """Expert, and its sorted rows."""
    offsets = rows.offsets.tolist()
    for expert, (first, stop) in enumerate(itertools.pairwise(offsets)):
        yield expert, slice(first, stop)


def error_of_inner(case: Case, experts: rk.ExpertWeights) -> tuple[float, Tensor, SortedSlots]:
    """Of h, relative to float64; h and the routing."""
    hidden, rows = routed(case, experts.dtype)
    up, gate = products.first_halves(experts)
    assert products.refusal(CPU, up, gate) is None
    h = products.product(hidden, up, rows, gate=gate, activation=experts.activation, gather=True)
    tokens = hidden.double()[rows.gather_index // rows.top_k]
    want = torch.cat([experts.inner(expert, tokens[own]) for expert, own in each_expert(rows)])
    return relative_error(h[: len(want)], want), h, rows


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("layout", ["stacked", "interleaved-biased", "ungated", "per-expert"])
def test_both_products_are_those_of_the_model(layout: str, dtype: torch.dtype) -> None:
    experts = make_experts(SIZES, layout, dtype=dtype)
    error, h, rows = error_of_inner(SIZES, experts)
    assert error < BOUNDS[dtype]
    y = products.product(h, Half.of(experts.down, experts.down_bias), rows)
    want = torch.cat([experts.output(e, h[own].double()) for e, own in each_expert(rows)])
    assert relative_error(y[: len(want)], want) < BOUNDS[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
def test_activations_are_the_formulas(activation: rk.Activation) -> None:
    layout = "interleaved-biased" if activation.gated else "ungated"
    experts = make_experts(SIZES, layout, replace(activation, alpha=1.3), torch.float16)
    assert error_of_inner(SIZES, experts)[0] < BOUNDS[torch.float16]


def test_nan_passes_and_stays_in_its_rows() -> None:
    experts = make_experts(SIZES, "ungated", dtype=torch.float16)
    hidden, rows = routed(SIZES, torch.float16)
    token = int(rows.gather_index[0]) // rows.top_k
    hidden[token, 3] = float("nan")
    h = products.product(
        hidden, Half.of(experts.up, None), rows, activation=rk.Activation("relu2"), gather=True
    )
    served = int(rows.offsets[-1])
    mine = rows.gather_index[:served] // rows.top_k == token
    assert h[:served][mine].isnan().all()
    assert not h[:served][~mine].isnan().any()


@pytest.mark.parametrize("first", ["gate", "up"])
def test_a_separate_gate_may_lie_before_or_after_up(first: str) -> None:
    both = make_experts(SIZES, "stacked", dtype=torch.float16).up
    assert isinstance(both, Tensor)
    low, high = both.flatten(0, 1).view(2, SIZES.experts, -1, SIZES.hidden)
    up, gate = (high, low) if first == "gate" else (low, high)
    down = make_experts(SIZES, "stacked", dtype=torch.float16).down
    experts = rk.ExpertWeights(up, down, rk.Activation("silu"), gate=gate)
    assert error_of_inner(SIZES, experts)[0] < BOUNDS[torch.float16]


def test_bits_depend_neither_on_the_order_nor_on_the_layout() -> None:
    case = SKEWED
    experts = make_experts(case, "stacked", dtype=torch.bfloat16)
    up, gate = products.first_halves(experts)
    assert isinstance(experts.up, Tensor)
    apart = rk.ExpertWeights(list(experts.up), list(experts.down), experts.activation)
    error, want, rows = error_of_inner(case, experts)
    assert error < BOUNDS[torch.bfloat16]
    served = int(rows.offsets[-1])
    module = cuda.host_module(env.cuda_host())
    hidden, _ = routed(case, torch.bfloat16)
    try:
        for seed in range(3):
            module.set_order(seed)
            for halves in (up, gate), products.first_halves(apart):
                h = products.product(
                    hidden,
                    halves[0],
                    rows,
                    gate=halves[1],
                    activation=experts.activation,
                    gather=True,
                    group=1 + seed,
                )
                assert torch.equal(h[:served], want[:served])
    finally:
        module.set_order(0)


def test_an_expanded_stack_has_one_matrix_for_all_experts() -> None:
    own = make_experts(SIZES, "stacked", dtype=torch.float16)
    assert isinstance(own.up, Tensor)
    shared = rk.ExpertWeights(own.up[:1].expand_as(own.up), own.down, own.activation)
    assert error_of_inner(SIZES, shared)[0] < BOUNDS[torch.float16]


def test_a_captured_graph_uploads_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendUnavailable, match="call the layer once before"):
        Tables().on_device("a key", torch.device("cuda"), lambda: torch.zeros(1))


class Uploaded:
    """A table that says it went to a device."""

    def pin_memory(self) -> "Uploaded":
        return self

    def to(self, *_: object, **__: object) -> "Uploaded":
        return self


def test_a_stream_awaits_the_copy_another_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        done = False

        def record(self, stream: str) -> None:
            said.append(f"recorded on {stream}")

        def query(self) -> bool:
            said.append("asked")
            return self.done

    class Stream(str):
        def wait_event(self, _: Event) -> None:
            said.append(f"{self} waits")

    def get() -> None:
        tables.on_device("a key", torch.device("cuda"), Uploaded)

    tables, capturing = Tables(), [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for stream in "first", "second":
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, own=stream: Stream(own))
        get()
    assert said == ["recorded on first", "asked", "second waits"]
    capturing[0] = True
    get()  # what captures a graph has waited for the device
    assert said[3:] == []
    capturing[0], Event.done = False, True
    get()
    get()
    assert said[3:] == ["asked"]


def test_tables_are_made_on_the_cpu_whatever_the_default_device() -> None:
    experts = make_experts(SIZES, "per-expert", dtype=torch.float16)
    hidden, rows = routed(SIZES, torch.float16)
    down = Half.of(experts.down, None)
    inner = hidden[:, : down.shape[1]].contiguous()
    want = products.product(inner, down, rows, gather=True)
    products._MAPS._kept.clear()
    with torch.device("meta"):
        got = products.product(inner, down, rows, gather=True)
    served = int(rows.offsets[-1])
    assert torch.equal(got[:served], want[:served])


def test_no_rows_need_no_launch() -> None:
    case = Case("no-tokens", "an empty batch is legal", tokens=0)
    hidden, rows = routed(case, torch.bfloat16)
    experts = make_experts(case, "stacked", dtype=torch.bfloat16)
    assert products.product(hidden, Half.of(experts.down, None), rows).shape == (0, case.hidden)


def stacked(*shape: int, dtype: torch.dtype = torch.float16) -> Half:
    return Half.of(torch.zeros(*shape, dtype=dtype), None)


def test_what_tma_cannot_read_is_refused_with_the_reason() -> None:
    fit = stacked(2, 16, 24)
    beside = replace(fit, addresses=(fit.addresses[0] + 1024,))
    assert products.refusal(CPU, fit, beside) is None
    assert "are one matrix" in (products.refusal(CPU, fit, fit) or "")
    reasons = {
        "float32; it takes": stacked(2, 16, 24, dtype=torch.float32),
        "16 x 20; TMA": stacked(2, 16, 20),
        "12 x 24; TMA": stacked(2, 12, 24),
        "stored transposed": Half.of(torch.zeros(2, 24, 16).half().transpose(1, 2), None),
        "strides of weights": Half.of(torch.zeros(2, 16, 28).half()[:, :, :24], None),
        "begin at multiples": Half.of(torch.zeros(2, 16, 32).half()[:, :, 4:28], None),
    }
    for reason, half in reasons.items():
        assert reason in (products.refusal(CPU, half) or "")
    wider = Half.of(torch.zeros(2, 16, 32).half()[:, :, :24], None)
    assert "different strides" in (products.refusal(CPU, fit, wider) or "")
    far = replace(fit, addresses=(fit.addresses[0] + (1 << 40),))
    assert "bytes apart" in (products.refusal(CPU, fit, far) or "")


def test_a_table_that_cannot_be_encoded_is_an_error() -> None:
    case = Case("two", "two experts", tokens=3, experts=2, hidden=24, intermediate=16)
    hidden, rows = routed(case, torch.float16)
    apart = Half.of([torch.zeros(16, 24).half() for _ in range(2)], None)
    odd = replace(apart, addresses=tuple(address + 2 for address in apart.addresses))
    with pytest.raises(KernelError, match="tensor maps of 2 experts"):
        products.product(hidden, odd, rows, gather=True)
