"""Neurons of experts: their order, the corrected down projections, and what is refused."""

import re

import pytest
import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.compensation import width
from reap_driver.compensation.width import cut_width, width_order
from reap_kernels import LayerGram
from reap_kernels.errors import DataError, DtypeError, ShapeError, UsageError

EXPERTS, HIDDEN, WIDTH, ROWS = 3, 24, 70, 300


@pytest.fixture
def rows() -> Tensor:
    """Inner activations of every expert, weighted: float64 [E, ROWS, WIDTH], correlated."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    plain = torch.randn(EXPERTS, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return plain @ mix


@pytest.fixture
def down() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64)


def summed(rows: Tensor, count: int | None = None) -> LayerGram:
    """A LayerGram of rows [E, n, I], with NaN where nothing may be read."""
    sums = LayerGram(rows.shape[0], rows.shape[2])
    above = torch.ones(rows.shape[2], rows.shape[2]).triu(1).bool()
    sums.gram.copy_((rows.mT @ rows).float()).masked_fill_(above, torch.nan)
    sums.count.fill_(rows.shape[1] if count is None else count)
    return sums


def one_at_a_time(down: Tensor, gram: Tensor, keep: int) -> tuple[list[int], Tensor]:
    """Optimal Brain Surgeon on one expert as it is written down: (order of removal, W')."""
    w, v, alive, order = down.clone(), torch.linalg.inv(gram), list(range(len(gram))), []
    while len(alive) > keep:
        n = min(alive, key=lambda n: float(w[:, n].square().sum() / v[n, n]))
        order.append(n)
        alive.remove(n)
        row, pivot = v[n].clone(), v[n, n].clone()
        w -= torch.outer(w[:, n], row) / pivot
        v -= torch.outer(row, row) / pivot
    return order, w[:, alive]


def shifted(gram: Tensor, ridge: float) -> Tensor:
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("keep", [1, 20, 37, 38, 69, 70])
def test_equals_one_removal_after_another(rows, down, keep) -> None:
    gram = rows.mT @ rows
    order = width_order(down, gram, least=keep)
    cut = rd.prune_width(down, gram, keep)
    for e in range(EXPERTS):
        removed, expected = one_at_a_time(down[e], shifted(gram[e], 1e-3), keep)
        assert order.removed[e].tolist() == removed
        assert cut.neurons[e].tolist() == sorted(set(range(WIDTH)) - set(removed))
        torch.testing.assert_close(cut.down[e], expected, rtol=1e-10, atol=1e-10)


def test_equals_least_squares_on_the_neurons_kept(rows, down) -> None:
    cut = rd.prune_width(down, rows.mT @ rows, 40, ridge=0.0)
    for e in range(EXPERTS):
        left, target = rows[e][:, cut.neurons[e]], rows[e] @ down[e].T
        best = torch.linalg.lstsq(left, target).solution
        torch.testing.assert_close(cut.down[e], best.T, rtol=1e-6, atol=1e-6)
        error = (left @ best - target).square().sum() / target.square().sum()
        torch.testing.assert_close(cut.error[e], error, rtol=1e-6, atol=0)


def test_error_is_that_of_the_rows(rows, down) -> None:
    cut = rd.prune_width(down, rows.mT @ rows, 40, ridge=0.1)
    for e in range(EXPERTS):
        target = rows[e] @ down[e].T
        lost = target - rows[e][:, cut.neurons[e]] @ cut.down[e].T
        expected = lost.square().sum() / target.square().sum()
        torch.testing.assert_close(cut.error[e], expected, rtol=1e-9, atol=0)


def test_one_order_serves_all_widths(rows, down) -> None:
    gram = rows.mT @ rows
    order = width_order(down, gram)
    larger = None
    for keep in (70, 50, 33, 10):
        cut, alone = cut_width(down, gram, order, keep), rd.prune_width(down, gram, keep)
        assert torch.equal(cut.neurons, alone.neurons)
        assert torch.equal(cut.down, alone.down)
        assert bool((order.error(keep) >= cut.error).all())  # that of the ridge included
        torch.testing.assert_close(order.error(keep), cut.error, rtol=0.1, atol=1e-12)
        for e in range(EXPERTS):
            assert larger is None or set(cut.neurons[e].tolist()) < set(larger[e].tolist())
        larger = cut.neurons
    assert bool(order.error(70).eq(0).all())


def test_all_neurons_kept_change_nothing(rows, down) -> None:
    cut = rd.prune_width(down, rows.mT @ rows, WIDTH)
    assert torch.equal(cut.down, down)
    assert cut.error.tolist() == [0.0] * EXPERTS


def test_takes_the_parameters_of_a_model(rows, down) -> None:
    gram = rows.mT @ rows
    cut = rd.prune_width(torch.nn.Parameter(down), gram, 30)
    assert not cut.down.requires_grad
    assert torch.equal(cut.down, rd.prune_width(down, gram, 30).down)


def test_of_equal_costs_the_first_goes_first() -> None:
    down, gram = torch.ones(1, 4, 6), torch.eye(6)[None]
    assert width_order(down, gram).removed.tolist() == [[0, 1, 2, 3, 4]]


def test_repeats_to_the_bit_whatever_is_worked_on_together(rows, down, monkeypatch) -> None:
    gram = rows.mT @ rows
    first, again = rd.prune_width(down, gram, 30), rd.prune_width(down, gram, 30)
    assert torch.equal(first.down, again.down)
    monkeypatch.setattr(width, "_WORK_BYTES", 1)
    alone = rd.prune_width(list(down), gram, 30)
    assert torch.equal(first.neurons, alone.neurons)
    torch.testing.assert_close(first.down, alone.down, rtol=1e-12, atol=1e-12)


def test_reads_the_lower_triangle_of_sums(rows, down) -> None:
    cut = rd.prune_width(down, summed(rows, 10_000), 30)
    expected = rd.prune_width(down, (rows.mT @ rows).float(), 30)
    assert torch.equal(cut.neurons, expected.neurons)
    torch.testing.assert_close(cut.down, expected.down, rtol=1e-12, atol=1e-12)
    assert cut.notes == ()


def test_some_experts_in_another_order(rows, down) -> None:
    sums = summed(rows)
    whole, some = rd.prune_width(down, sums, 30), rd.prune_width(down, sums, 30, experts=[2, 0])
    assert torch.equal(some.neurons, whole.neurons[[2, 0]])
    torch.testing.assert_close(some.down, whole.down[[2, 0]], rtol=1e-12, atol=1e-12)


def test_matrices_are_rounded_once(rows, down) -> None:
    coarse, gram = down.bfloat16(), rows.mT @ rows
    cut, exact = rd.prune_width(coarse, gram, 30), rd.prune_width(coarse.double(), gram, 30)
    assert torch.equal(cut.neurons, exact.neurons)
    assert torch.equal(cut.down, exact.down.bfloat16())


def test_experts_without_rows_keep_their_largest_neurons(rows, down) -> None:
    sums = summed(rows)
    sums.gram[1], sums.count[1] = 0, 0
    cut = rd.prune_width(down, sums, 30)
    longest = down[1].square().sum(0).topk(30).indices.sort().values
    assert torch.equal(cut.neurons[1], longest)
    torch.testing.assert_close(cut.down[1], down[1][:, longest], rtol=1e-12, atol=1e-12)
    assert cut.error[1] == 0
    assert cut.error[0] > 0
    [note] = cut.notes
    assert note.startswith("1 of 3 experts have no rows")
    assert note.endswith(": [1]")


def test_experts_with_few_rows_get_a_larger_ridge(rows, down) -> None:
    sums = summed(rows, 10_000)
    sums.count[2] = 35
    cut = rd.prune_width(down, sums, 30)
    gram = (rows.mT @ rows).float()
    enough, raised = rd.prune_width(down, gram, 30), rd.prune_width(down, gram, 30, ridge=4.0)
    torch.testing.assert_close(cut.down[:2], enough.down[:2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut.down[2], raised.down[2], rtol=1e-12, atol=1e-12)
    [note] = cut.notes
    assert "1 of 3 experts have fewer than 140 rows" in note
    assert note.endswith("{2: 35}")


def changed(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


REFUSED = {
    "another layer's Gram": (
        lambda down, gram: rd.prune_width(down, gram[:, :8, :8], 30),
        ShapeError,
        "gram has shape (3, 8, 8); 3 experts of 70 neurons need (3, 70, 70)",
    ),
    "one matrix": (lambda down, gram: rd.prune_width(down[0], gram, 30), ShapeError, "[E, H, I]"),
    "no neuron": (
        lambda down, gram: rd.prune_width(down, gram, 0),
        ShapeError,
        "keep from 1 to 70",
    ),
    "more neurons": (lambda down, gram: rd.prune_width(down, gram, 71), ShapeError, "keep 71"),
    "integers": (lambda down, gram: rd.prune_width(down.long(), gram, 3), DtypeError, "int64"),
    "a ridge below 0": (
        lambda down, gram: rd.prune_width(down, gram, 30, ridge=-0.1),
        UsageError,
        "ridge is -0.1",
    ),
    "an expert that is not there": (
        lambda down, gram: rd.prune_width(down, gram, 30, experts=[0, 3]),
        UsageError,
        "experts [3]: the layer has the ids 0..2",
    ),
    "a Gram with NaN": (
        lambda down, gram: rd.prune_width(down, changed(gram, (1, 5, 2), torch.nan), 30),
        DataError,
        "the Gram of expert 1 has NaN or Inf",
    ),
    "a matrix with Inf": (
        lambda down, gram: rd.prune_width(changed(down, (2, 5, 2), torch.inf), gram, 30),
        DataError,
        "the down projection of expert 2 has NaN or Inf",
    ),
    "a singular Gram": (
        lambda down, gram: rd.prune_width(
            down, changed(changed(gram, (1, 5), 0), (1, slice(None), 5), 0), 30, ridge=0.0
        ),
        DataError,
        "the Gram of expert 1 is not positive definite; use a ridge of 0.001",
    ),
    "a width that is not in the order": (
        lambda down, gram: width_order(down, gram, least=40).error(39),
        ShapeError,
        "holds widths from 40 to 70; make it with `least=39`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, rows, down) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=re.escape(message)):
        call(down, rows.mT @ rows)


def test_an_order_of_some_experts(rows, down) -> None:
    sums = summed(rows)
    some = width_order(down, sums).of([2, 0])
    cut = cut_width(down, sums, some, 37, experts=[2, 0])
    alone = rd.prune_width(down, sums, 37, experts=[2, 0])
    assert cut.neurons.equal(alone.neurons)
    torch.testing.assert_close(cut.down, alone.down)
    torch.testing.assert_close(cut.error, alone.error)
