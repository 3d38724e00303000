"""pytest-benchmark entry: the single ops at small and medium sizes, checked, then timed.

`pytest bench --benchmark-only`
"""

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("observed", [False, True], ids=["plain", "observed"])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_observe_layer(benchmark, case: Case, observed: bool, dtype: torch.dtype) -> None:
    inputs, experts = make_inputs(case, dtype), make_experts(case, dtype=dtype)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts)
    stats = rk.LayerStats(case.experts) if observed else None
    want = rk.observe_layer(*call, backend="reference")
    assert relative_error(rk.observe_layer(*call, stats), want) < 5e-3
    benchmark(rk.observe_layer, *call, stats)


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_route(benchmark, case: Case) -> None:
    inputs = make_inputs(case)
    want = rk.route(inputs.topk_ids, case.experts, backend="reference")
    assert torch.equal(rk.route(inputs.topk_ids, case.experts).order, want.order)
    benchmark(rk.route, inputs.topk_ids, case.experts)


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_accumulate(benchmark, case: Case) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = case.tokens * case.top_k
    y = torch.randn(rows, case.hidden, generator=rng)
    ids = torch.randint(0, case.experts, (rows,), generator=rng)
    gates = torch.rand(rows, generator=rng)
    got, want = rk.LayerStats(case.experts), rk.LayerStats(case.experts)
    rk.accumulate(y, ids, gates, got)
    rk.accumulate(y, ids, gates, want, backend="reference")
    assert relative_error(got.sums, want.sums) < 1e-6
    benchmark(rk.accumulate, y, ids, gates, got)
