"""Down projections solved again: the direct solution, what is not fitted, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reap_driver as rd
import reap_kernels as rk
from reap_driver.compensation.pilot import least
from reap_driver.compensation.refit import _changed
from reap_kernels.errors import DataError, ShapeError, UsageError

EXPERTS, HIDDEN, WIDTH, TOP_K, TOKENS = 5, 24, 10, 2, 96


def layer(dtype: torch.dtype = torch.float32) -> rk.ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)
    bias = torch.randn(EXPERTS, HIDDEN, generator=generator)
    up, down, bias = (tensor.to(dtype) for tensor in (up, down, bias))
    return rk.ExpertWeights(up, down, rk.Activation("silu"), down_bias=bias)


def batches(
    dtype: torch.dtype = torch.float32, number: int = 8, experts: int = EXPERTS, noise: float = 1.0
) -> list[rd.ExpertRows]:
    """Rows whose `missing` has a part that other down projections of the layer would add, and
    noise; every fourth batch is held out.
    """
    generator = torch.Generator().manual_seed(1)
    other = layer()
    change = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) / 4
    other = replace(other, down=change, down_bias=None)
    found = []
    for index in range(number):
        hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
        scores = torch.rand(TOKENS, experts, generator=generator)
        weights, ids = scores.topk(TOP_K)
        missing = rk.observe_layer(hidden, ids, weights, other)
        missing += noise / 10 * torch.randn(TOKENS, HIDDEN, generator=generator)
        given = hidden.to(dtype), ids, weights.to(dtype), missing
        found.append(rd.ExpertRows(*given, held_out=index % 4 == 3))
    return found


def inner(experts: rk.ExpertWeights, rows: rd.ExpertRows) -> Tensor:
    """Phi, as it is written down: float64 [T, E * I], g_j h_j of every token and expert."""
    found = torch.zeros(len(rows.hidden), EXPERTS, WIDTH, dtype=torch.float64)
    for token, (ids, weights) in enumerate(zip(rows.ids, rows.weights, strict=True)):
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            both = experts.up[expert].double() @ rows.hidden[token].double()
            gate, up = both.chunk(2)
            found[token, expert] = weight.double() * torch.nn.functional.silu(gate) * up
    return found.flatten(1)


def direct(experts: rk.ExpertWeights, rows: list[rd.ExpertRows], ridge: float) -> Tensor:
    """The changes by the normal equations, solved as one system: float64 [E, H, I]."""
    fitted = [batch for batch in rows if not batch.held_out]
    phi = torch.cat([inner(experts, batch) for batch in fitted])
    missing = torch.cat([batch.missing for batch in fitted]).double()
    gram = phi.T @ phi
    shift = ridge * gram.diagonal().mean()
    solved = torch.linalg.solve(gram + shift * torch.eye(len(gram)).double(), phi.T @ missing)
    return solved.view(EXPERTS, WIDTH, HIDDEN).mT


def error(
    experts: rk.ExpertWeights, rows: list[rd.ExpertRows], change: Tensor, *, held: bool
) -> float:
    """Mean over tokens of the squared norm of what a change leaves."""
    found = []
    for batch in rows:
        if batch.held_out is held:
            made = inner(experts, batch) @ change.double().mT.reshape(-1, HIDDEN)
            found.append((batch.missing.double() - made).square().sum(1))
    return float(torch.cat(found).mean())


def test_many_steps_are_the_direct_solution() -> None:
    experts, rows = layer(), batches()
    found = rd.refit_layer(experts, rows, ridge=0.01, steps=30)
    want = direct(experts, rows, 0.01)
    change = found.down.double() - experts.down.double()
    assert torch.allclose(change, want, atol=1e-5 * float(want.abs().max()), rtol=1e-4)
    assert found.kept
    assert found.error_before == pytest.approx(error(experts, rows, 0 * want, held=True), rel=1e-6)
    assert found.error_after == pytest.approx(error(experts, rows, want, held=True), rel=1e-4)
    assert found.gain > 0.5


def test_two_steps_come_close() -> None:
    experts, rows = layer(), batches(number=16)
    change = rd.refit_layer(experts, rows, ridge=0.03).down - experts.down
    best = error(experts, rows, direct(experts, rows, 0.03), held=True)
    one = rd.refit_layer(experts, rows, ridge=0.03, steps=1)
    assert error(experts, rows, change, held=True) < 1.1 * best
    assert error(experts, rows, change, held=True) < one.error_after


def test_takes_the_parameters_of_a_model() -> None:
    experts = layer()
    trained = replace(
        experts, up=torch.nn.Parameter(experts.up), down=torch.nn.Parameter(experts.down)
    )
    found = rd.refit_layer(trained, batches())
    assert not found.down.requires_grad
    assert torch.equal(found.down, rd.refit_layer(experts, batches()).down)


def test_a_run_again_has_the_same_bits() -> None:
    first, again = (rd.refit_layer(layer(), batches()) for _ in range(2))
    assert torch.equal(first.down, again.down)
    assert first.error_after == again.error_after


@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_the_ridge_is_near_the_best_on_held_out_batches(noise) -> None:
    experts, rows = layer(), batches(number=24, noise=noise)
    found = rd.refit_layer(experts, rows)
    tried = [rd.refit_layer(experts, rows, ridge=10**n).error_after for n in (-3, -2, -1, 0, 1)]
    assert found.error_after < 1.02 * min(tried)


def test_rows_in_other_batches_change_rounding_only() -> None:
    experts, rows = layer(), batches()
    halves = [
        replace(
            batch,
            hidden=batch.hidden[part],
            ids=batch.ids[part],
            weights=batch.weights[part],
            missing=batch.missing[part],
        )
        for batch in rows
        for part in (slice(0, 40), slice(40, None))
    ]
    one, other = (rd.refit_layer(experts, given, ridge=0.1).down for given in (rows, halves))
    assert torch.allclose(one, other, atol=1e-5)


def test_masked_tokens_add_nothing_whatever_they_hold() -> None:
    experts, rows = layer(), batches()
    mask = torch.arange(TOKENS) % 3 > 0
    masked = []
    for batch in rows:
        missing, hidden = batch.missing.clone(), batch.hidden.clone()
        missing[~mask], hidden[~mask] = torch.nan, torch.nan
        masked.append(replace(batch, missing=missing, hidden=hidden, mask=mask))
    without = [
        replace(
            batch,
            hidden=batch.hidden[mask],
            ids=batch.ids[mask],
            weights=batch.weights[mask],
            missing=batch.missing[mask],
        )
        for batch in rows
    ]
    one, other = (rd.refit_layer(experts, given) for given in (masked, without))
    assert torch.allclose(one.down, other.down, atol=1e-5)
    assert one.error_after == pytest.approx(other.error_after, rel=1e-5)


def test_experts_without_rows_keep_their_matrices() -> None:
    experts = layer()
    found = rd.refit_layer(experts, batches(experts=EXPERTS - 2), ridge=0.1)
    assert found.kept
    assert torch.equal(found.down[-2:], experts.down[-2:])
    assert not torch.equal(found.down[0], experts.down[0])


def test_nothing_is_changed_where_no_token_is_routed() -> None:
    experts = layer()
    rows = [replace(batch, weights=torch.zeros(TOKENS, TOP_K)) for batch in batches()]
    found = rd.refit_layer(experts, rows)
    assert not found.kept
    assert torch.equal(found.down, experts.down)
    assert (found.ridge, found.gain) == (0.0, 0.0)


def test_fewer_rows_than_neurons_are_no_trouble() -> None:
    experts = layer()
    rows = [
        replace(b, hidden=b.hidden[:4], ids=b.ids[:4], weights=b.weights[:4], missing=b.missing[:4])
        for b in batches(number=4)
    ]
    found = rd.refit_layer(experts, rows, ridge=0.1, steps=30)
    want = direct(experts, rows, 0.1)
    assert found.down.isfinite().all()
    if found.kept:
        assert torch.allclose((found.down - experts.down).double(), want, atol=1e-4)
    assert found.error_after == pytest.approx(error(experts, rows, want, held=True), rel=1e-3)


def test_a_singular_gram_is_solved_with_the_ridge() -> None:
    experts = layer()
    up = experts.up.clone()
    up[:, 1] = up[:, 0]
    up[:, WIDTH + 1] = up[:, WIDTH]  # two neurons that are always equal
    experts, rows = replace(experts, up=up), batches()
    found = rd.refit_layer(experts, rows, ridge=1e-3, steps=40)
    change = (found.down - experts.down).double()
    assert torch.allclose(change, direct(experts, rows, 1e-3), atol=1e-3)
    assert torch.allclose(change[:, :, 0], change[:, :, 1], atol=1e-4)


def test_what_helps_only_the_fitted_batches_is_not_kept() -> None:
    experts = layer()
    rows = [
        replace(batch, missing=-batch.missing) if batch.held_out else batch for batch in batches()
    ]
    found = rd.refit_layer(experts, rows, ridge=0.01)
    assert not found.kept
    assert found.error_after > found.error_before
    assert torch.equal(found.down, experts.down)


def test_bf16_layers_are_summed_in_float32() -> None:
    experts, rows = layer(torch.bfloat16), batches(torch.bfloat16)
    found = rd.refit_layer(experts, rows, ridge=0.03)
    assert found.down.dtype == torch.bfloat16
    wide = replace(
        experts,
        **{name: getattr(experts, name).float() for name in ("up", "down", "down_bias")},
    )
    rows = [
        replace(batch, hidden=batch.hidden.float(), weights=batch.weights.float()) for batch in rows
    ]
    want = rd.refit_layer(wide, rows, ridge=0.03)
    assert found.error_after == pytest.approx(want.error_after, rel=0.02)
    lost = (found.down.float() - want.down).norm() / (want.down - wide.down).norm()
    assert lost < 0.03  # of rounding the matrices to bf16


def test_matrices_are_rounded_once() -> None:
    experts = layer(torch.bfloat16)
    change = torch.full(experts.down.shape, 2.0**-12)
    want = (experts.down.double() + 2.0**-12).bfloat16()
    assert torch.equal(_changed(experts, change), want)


def test_the_lowest_point_of_a_parabola() -> None:
    assert least([0.01, 0.1, 1.0], [4.0, 1.0, 0.0]) == 1.0
    assert least([0.01, 0.1, 1.0], [3.0, 1.0, 2.0]) == pytest.approx(10 ** (-1 + 1 / 6))
    assert least([0.01, 0.1, 1.0], [2.0, 2.0, 2.0]) == 0.01


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"ridge": 0.0}, UsageError, "ridge is 0; give a number above 0"),
        ({"ridge": float("nan")}, UsageError, "ridge is nan"),
        ({"steps": 0}, UsageError, "steps is 0; give 1 or more"),
    ],
)
def test_impossible_numbers(change, error_type, message) -> None:
    with pytest.raises(error_type, match=message):
        rd.refit_layer(layer(), batches(), **change)


def test_rows_that_do_not_fit() -> None:
    rows = batches()
    rows[2] = replace(rows[2], missing=rows[2].missing[1:])
    with pytest.raises(ShapeError, match=r"missing of batch 2 has shape \(95, 24\)"):
        rd.refit_layer(layer(), rows)


def test_nothing_fitted_or_held_out() -> None:
    rows = batches()
    with pytest.raises(DataError, match="no token is fitted"):
        rd.refit_layer(layer(), [batch for batch in rows if batch.held_out])
    fitted = [batch for batch in rows if not batch.held_out]
    with pytest.raises(DataError, match="no token is held out to choose the ridge by"):
        rd.refit_layer(layer(), fitted)
    assert rd.refit_layer(layer(), fitted, ridge=0.1).kept


def test_missing_that_is_not_finite() -> None:
    rows = batches()
    rows[0].missing[3, 5] = torch.inf
    with pytest.raises(DataError, match="what is missing has NaN or Inf"):
        rd.refit_layer(layer(), rows)
