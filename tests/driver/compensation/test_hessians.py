"""Hessians of down projections against their definition, from rows of each expert."""

import pytest
import torch

import reap_driver as rd
import reap_kernels as rk
from reap_kernels.errors import DataError, ShapeError

EXPERTS, WIDTH = 3, 6


def rows_of(expert: int, rows: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """h [rows, I] and router weights [rows] of one expert, float64."""
    draw = torch.Generator().manual_seed(expert)
    h = torch.randn(rows, WIDTH, generator=draw, dtype=torch.float64)
    return h, torch.rand(rows, generator=draw, dtype=torch.float64) + 0.1


def sums_of(weights: dict[int, torch.Tensor]) -> rk.LayerGram:
    """Sums as a layer leaves them: lower triangles only, the rest is junk."""
    sums = rk.LayerGram(EXPERTS, WIDTH)
    junk = torch.full((WIDTH, WIDTH), torch.nan).triu(1)
    for expert, g in weights.items():
        h, _ = rows_of(expert)
        second = (h.T * g**2) @ h
        sums.gram[expert] = torch.where(junk.isnan(), junk, second).float()
        sums.weight[expert] = (g**2).sum()
        sums.count[expert] = len(h)
    return sums


def test_they_are_weighted_means_by_definition() -> None:
    sums = sums_of({expert: rows_of(expert)[1] for expert in range(EXPERTS)})
    torch.set_default_dtype(torch.float64)
    try:
        found = rd.down_hessians(sums)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert found.shape == (EXPERTS, WIDTH, WIDTH)
    for expert in range(EXPERTS):
        h, g = rows_of(expert)
        expected = 2 * (h.T * g**2) @ h / (g**2).sum()
        torch.testing.assert_close(found[expert].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.mT)


def test_equal_router_weights_give_gptqs_own() -> None:
    sums = sums_of({0: torch.full((20,), 0.25, dtype=torch.float64)})
    h, _ = rows_of(0)
    torch.testing.assert_close(
        rd.down_hessians(sums)[0].double(), 2 / len(h) * h.T @ h, rtol=1e-5, atol=1e-5
    )


def test_experts_without_rows_are_rounded_to_nearest() -> None:
    found = rd.down_hessians(sums_of({1: rows_of(1)[1]}))
    assert torch.equal(found[0], torch.eye(WIDTH))
    assert torch.equal(found[2], torch.eye(WIDTH))
    assert not torch.equal(found[1], torch.eye(WIDTH))


def test_a_plan_names_experts_and_neurons() -> None:
    sums = sums_of({expert: rows_of(expert)[1] for expert in range(EXPERTS)})
    whole = rd.down_hessians(sums)
    cut = rd.LayerPlan.keeping(EXPERTS, (0, 2))
    assert torch.equal(rd.down_hessians(sums, cut), whole[[0, 2]])
    neurons = ((0, 3, 5), (1, 2, 4))
    narrow = rd.down_hessians(sums, rd.LayerPlan.keeping(EXPERTS, (0, 2), WIDTH, neurons))
    for place, (expert, ids) in enumerate(zip((0, 2), neurons, strict=True)):
        assert torch.equal(narrow[place], whole[expert][list(ids)][:, list(ids)])


def test_plans_of_other_layers_are_refused() -> None:
    sums = rk.LayerGram(EXPERTS, WIDTH)
    with pytest.raises(ShapeError, match="plan is of 4 experts of 6 neurons, these sums of 3 of 6"):
        rd.down_hessians(sums, rd.LayerPlan.keeping(4, (0,)))
    with pytest.raises(ShapeError, match="of 8 neurons"):
        rd.down_hessians(sums, rd.LayerPlan.keeping(EXPERTS, (0,), 8, ((1,),)))


def test_sums_that_are_not_finite_are_refused() -> None:
    sums = sums_of({0: rows_of(0)[1]})
    sums.gram[0, 1, 0] = torch.nan
    with pytest.raises(DataError, match="expert 0 is NaN or infinite"):
        rd.down_hessians(sums)
