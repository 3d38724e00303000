"""Single ops at small and medium sizes, checked, then timed, by pytest-benchmark.

`pytest bench --benchmark-only` runs each on the CPU and, if there is one, on a GPU.
"""

from collections.abc import Callable

import pytest
import torch

import reap_kernels as rk
from reap_kernels.testing import Case, make_experts, make_inputs, relative_error

SHAPES = (
    Case("decode", "one token", tokens=1, experts=64, top_k=8, hidden=512, intermediate=256),
    Case("batch", "512 tokens", tokens=512, experts=64, top_k=8, hidden=512, intermediate=256),
    Case(
        "zipf",
        "512 tokens, skewed",
        tokens=512,
        experts=64,
        top_k=8,
        hidden=512,
        intermediate=256,
        skew="zipf",
    ),
)
_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
pytestmark = [
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=_NO_GPU)]),
    pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name),
]


def finished(call: Callable[[], object], device: str) -> Callable[[], None]:
    """Runs the call and waits for the device."""

    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("observed", [False, True], ids=["plain", "observed"])
def test_observe_layer(
    benchmark, case: Case, observed: bool, dtype: torch.dtype, device: str
) -> None:
    inputs = make_inputs(case, dtype, device=device)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights)
    call = (*call, make_experts(case, dtype=dtype, device=device))
    stats = rk.LayerStats(case.experts, device=device) if observed else None
    want = rk.observe_layer(*call, backend="reference")
    assert relative_error(rk.observe_layer(*call, stats), want) < 5e-3
    benchmark(finished(lambda: rk.observe_layer(*call, stats), device))


def test_route(benchmark, case: Case, device: str) -> None:
    ids = make_inputs(case, device=device).topk_ids
    want = rk.sort_by_expert(ids, case.experts, backend="reference")
    assert torch.equal(rk.sort_by_expert(ids, case.experts).gather_index, want.gather_index)
    benchmark(finished(lambda: rk.sort_by_expert(ids, case.experts), device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expert_outputs(benchmark, case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(case, dtype, device=device)
    experts = make_experts(case, dtype=dtype, device=device)
    routing = rk.sort_by_expert(inputs.topk_ids, case.experts)
    want = rk.expert_outputs(inputs.hidden, routing, experts, backend="reference")
    assert relative_error(rk.expert_outputs(inputs.hidden, routing, experts), want) < 5e-3
    benchmark(finished(lambda: rk.expert_outputs(inputs.hidden, routing, experts), device))


def test_accumulate(benchmark, case: Case, device: str) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = case.tokens * case.top_k
    y = torch.randn(rows, case.hidden, generator=rng).to(device)
    ids = torch.randint(0, case.experts, (rows,), generator=rng).to(device)
    weights = torch.rand(rows, generator=rng).to(device)
    got, want = (rk.LayerStats(case.experts, device=device) for _ in range(2))
    rk.accumulate(y, ids, weights, got)
    rk.accumulate(y, ids, weights, want, backend="reference")
    assert relative_error(got.sums, want.sums) < 1e-6
    benchmark(finished(lambda: rk.accumulate(y, ids, weights, got), device))
