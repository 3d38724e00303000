"""The layer by CUDA kernels for Hopper in one call, run on the CPU by the emulation of `csrc/host`.

Bounds are those of test_backends.py; what the products do, test_products.py shows.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reap_kernels as rk
from reap_kernels import cuda, env, tuning
from reap_kernels.dispatch import Request, Sizes
from reap_kernels.errors import BackendUnavailable
from reap_kernels.layer import wgmma_backend
from reap_kernels.layer.call import LayerCall
from reap_kernels.layer.kernel_cuda import observe_layer as run_layer
from reap_kernels.testing import (
    CASES,
    Case,
    largest_relative_error,
    make_experts,
    make_inputs,
    relative_error,
)

CPU = torch.device("cpu")
FIT = [case for case in CASES if not (case.hidden % 8 or case.intermediate % 8)]
EVERYTHING = next(case for case in CASES if case.name == "everything")
BOUNDS = {torch.bfloat16: (5e-3, 1e-2), torch.float16: (1e-3, 2e-3)}  # outputs, sums


def observe(
    case: Case, experts: rk.ExpertWeights, backend: str, chunk: int | None = None
) -> tuple[torch.Tensor, rk.LayerStats]:
    inputs, stats = make_inputs(case, experts.dtype), rk.LayerStats(case.experts, case.groups)
    out = rk.observe_layer(
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        experts,
        stats,
        mask=inputs.mask,
        group=inputs.group,
        chunk=chunk,
        backend=backend,
    )
    return out, stats


def compare(case: Case, experts: rk.ExpertWeights) -> None:
    (out, got), (truth, want) = (observe(case, experts, name) for name in ("wgmma", "reference"))
    output, sums = BOUNDS[experts.dtype]
    assert relative_error(out, truth) <= output
    for name in (*rk.stats.COUNTS, "tokens"):
        assert torch.equal(got.fields()[name], want.fields()[name]), name
    for name in rk.stats.SUMS:
        assert largest_relative_error(got.fields()[name], want.fields()[name]) <= sums, name
    for name in rk.stats.EXTREMA:
        torch.testing.assert_close(
            got.fields()[name], want.fields()[name], rtol=10 * output, atol=10 * output
        )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", FIT, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    compare(case, make_experts(case, dtype=torch.float16))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["stacked", "interleaved-biased", "ungated", "per-expert"])
def test_layouts(layout: str) -> None:
    compare(EVERYTHING, make_experts(EVERYTHING, layout, dtype=torch.bfloat16))


def test_outputs_alone_need_no_statistics() -> None:
    experts, inputs = make_experts(EVERYTHING, dtype=torch.float16), make_inputs(EVERYTHING)
    hidden = inputs.hidden.half()
    out = rk.observe_layer(hidden, inputs.topk_ids, inputs.topk_weights, experts, backend="wgmma")
    want = rk.observe_layer(
        hidden, inputs.topk_ids, inputs.topk_weights, experts, backend="reference"
    )
    assert relative_error(out, want) <= BOUNDS[torch.float16][0]


def test_tokens_may_lie_at_any_address() -> None:
    experts, inputs = make_experts(EVERYTHING, dtype=torch.float16), make_inputs(EVERYTHING)
    routing = inputs.topk_ids, inputs.topk_weights
    hidden = inputs.hidden.half()
    odd = torch.empty(hidden.numel() + 1, dtype=torch.float16)[1:].view_as(hidden).copy_(hidden)
    assert odd.data_ptr() % 16
    want = rk.observe_layer(hidden, *routing, experts, backend="wgmma")
    assert torch.equal(rk.observe_layer(odd, *routing, experts, backend="wgmma"), want)


@pytest.fixture
def orders() -> Iterator[Any]:
    """Sets the order of threads and blocks, and the natural one in the end."""
    module = cuda.host_module(env.cuda_host())
    yield module.set_order
    module.set_order(0)


def test_bits_do_not_depend_on_the_order(orders: Any) -> None:
    experts = make_experts(EVERYTHING, dtype=torch.bfloat16)
    want, kept = observe(EVERYTHING, experts, "wgmma")
    for seed in (1, 2, 3):
        orders(seed)
        got, stats = observe(EVERYTHING, experts, "wgmma")
        assert torch.equal(got, want)
        assert all(map(torch.equal, stats.packed(), kept.packed()))


def test_parts_have_the_bits_of_the_whole() -> None:
    experts = make_experts(EVERYTHING, dtype=torch.float16)
    whole, want = observe(EVERYTHING, experts, "wgmma")
    parts, got = observe(EVERYTHING, experts, "wgmma", chunk=7)
    assert torch.equal(parts, whole)
    assert torch.equal(got.count, want.count)
    for name in rk.stats.SUMS:
        assert largest_relative_error(got.fields()[name], want.fields()[name]) <= 1e-12


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_call_allocates_its_output_and_one_workspace() -> None:
    inputs = make_inputs(EVERYTHING, torch.float16)
    experts = make_experts(EVERYTHING, dtype=torch.float16)
    stats = rk.LayerStats(EVERYTHING.experts, EVERYTHING.groups)
    call = LayerCall(
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        experts,
        stats,
        inputs.mask,
        inputs.group,
    )
    run_layer(call)
    with Operators() as seen:
        run_layer(call)
    views = ("aten::slice", "aten::view", "aten::select", "aten::detach", "aten::alias")
    rest = [name for name in seen.names if not name.startswith(views)]
    assert rest == ["aten::empty.memory_format"] * 2


def request(**facts: Any) -> Request:
    sizes = Sizes(64, 2, 8, 64, 32)
    return Request("layer", CPU, torch.bfloat16, "silu", sizes)._replace(**facts)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"gram": True}, "no inner activations"),
        ({"activation": "opaque"}, "no kernel for the activation 'opaque'"),
        ({"layout": "quantized"}, "dequantizes experts by chunks"),
        ({"sizes": Sizes(64, 2, 8, 60, 32)}, "hidden is 60"),
        ({"sizes": Sizes(64, 2, 8, 64, 36)}, "intermediate is 36"),
        ({"sizes": Sizes(64, 33, 64, 64, 32)}, "k = 33 is above 32"),
        ({"boxes": ""}, "rows are contiguous"),
    ],
)
def test_what_it_does_not_serve_is_refused(facts: dict[str, Any], reason: str) -> None:
    assert wgmma_backend.limits(request()) is None
    assert reason in str(wgmma_backend.limits(request(**facts)))


@pytest.mark.parametrize("layout", ["transposed", "blocks"])
def test_strides_that_tma_cannot_read_are_refused(layout: str) -> None:
    experts = make_experts(EVERYTHING, layout, dtype=torch.float16)
    with pytest.raises(BackendUnavailable, match="rows are contiguous"):
        observe(EVERYTHING, experts, "wgmma")


def test_a_separate_tensor_at_an_odd_address_is_refused_in_the_call() -> None:
    experts = make_experts(EVERYTHING, "per-expert", dtype=torch.float16)
    down = list(experts.down)
    room = torch.empty(down[-1].numel() + 1, dtype=torch.float16)
    down[-1] = room[1:].view(down[-1].shape).copy_(down[-1])
    with pytest.raises(BackendUnavailable, match=r"multiples of 16 bytes.*REAP_BACKEND=triton"):
        observe(EVERYTHING, replace(experts, down=down), "wgmma")


def test_it_serves_by_name_or_by_a_line_of_the_table_alone(monkeypatch: Any) -> None:
    assert wgmma_backend.priority(request()) < 0  # `reference` has 0, and always serves
    monkeypatch.setattr(tuning, "choose_backend", lambda *_, **__: "wgmma")
    assert wgmma_backend.priority(request()) > 30


def test_shipped_tables_leave_it_off() -> None:
    lines = [
        entry
        for path in tuning.CONFIGS.glob("*.json")
        for entry in tuning.Table.load(path).entries
        if entry.backend == "wgmma"
    ]
    assert lines
    assert all(entry.off for entry in lines)


def test_the_workspace_holds_what_its_arrays_need() -> None:
    """The list at the top of csrc/layer.cpp, added up."""
    tokens, top_k, experts, width, inner, groups = 300, 2, 5, 64, 32, 3
    slots, bins, tiles = tokens * top_k, experts + 1, 600 // 256 + experts
    int32 = [-(-slots // 256) * bins, bins, tiles, tiles, bins]
    arrays = [8 * bins, 8 * slots, 8 * slots, *(4 * count for count in int32)]
    arrays += [2 * slots * inner, 2 * slots * width]
    measured = [4 * slots] * 3 + [8 * 9 * groups * tiles]
    module = cuda.host_module(env.cuda_host())
    sizes = {"tokens": tokens, "top_k": top_k, "experts": experts, "width": width, "inner": inner}

    def rounded(sizes_: list[int]) -> int:
        return sum(-(-size // 256) * 256 for size in sizes_)

    assert module.layer_bytes(**sizes, groups=0) == rounded(arrays)
    assert module.layer_bytes(**sizes, groups=groups) == rounded(arrays + measured)
