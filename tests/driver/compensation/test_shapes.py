"""Shapes that fit a layer, what each is expected to cost, and constants for removed experts."""

import math
import re

import pytest
import torch

import reap_kernels as rk
from reap_driver.compensation.constants import expert_constants
from reap_driver.compensation.shapes import (
    allowed_shapes,
    check_shape,
    expected_error,
    width_multiple,
)
from reap_driver.compensation.width import width_order
from reap_driver.planning.budget import Router
from reap_driver.planning.shape import Shape
from reap_kernels.errors import PlanError, ShapeError

PLAIN = Router("layers.3", num_experts=32, top_k=4, n_group=1, topk_group=1)
GROUPED = Router("layers.3", num_experts=32, top_k=4, n_group=4, topk_group=2)


def texts(shapes: list[Shape]) -> list[str]:
    return [str(shape) for shape in shapes]


def test_every_width_has_one_shape() -> None:
    assert texts(allowed_shapes(PLAIN, 48, 0.5)) == ["24x32", "16x48"]  # multiples of 16
    finer = texts(allowed_shapes(PLAIN, 48, 0.5, multiple=4))
    assert finer == ["32x24", "27x28", "24x32", "21x36", "19x40", "17x44", "16x48"]
    assert texts(allowed_shapes(PLAIN, 48, 0.25, multiple=4)) == [
        "32x36",
        "28x40",
        "26x44",
        "24x48",
    ]


def test_routers_keep_what_they_need() -> None:
    assert texts(allowed_shapes(PLAIN, 48, 0.9, multiple=16)) == ["9x16"]
    assert texts(allowed_shapes(GROUPED, 48, 0.5, multiple=4)) == [
        "32x24",
        "24x32",
        "20x36",
        "16x44",
        "16x48",
    ]


def test_multiples_by_default() -> None:
    assert [width_multiple(width) for width in (768, 1408, 48, 2880)] == [64, 64, 16, 64]


def test_shapes_are_read_from_text() -> None:
    assert Shape.parse(" 96X512 ") == Shape(96, 512)
    assert str(Shape.parse("96x512")) == "96x512"
    for text in ("half", "96", "0x512", "96x512x2", ""):
        with pytest.raises(ValueError, match="give auto, or experts and neurons"):
            Shape.parse(text)


REFUSED = {
    "ratio": (lambda: allowed_shapes(PLAIN, 48, 1.5), "ratio 1.5"),
    "too much": (lambda: allowed_shapes(PLAIN, 48, 0.99), "its router needs 4 experts"),
    "multiple": (lambda: allowed_shapes(PLAIN, 48, 0.5, multiple=49), "`width_multiple=49`"),
    "width": (lambda: check_shape(Shape(24, 30), PLAIN, 48), "use 16 or 32"),
    "experts": (lambda: check_shape(Shape(3, 32), PLAIN, 48), "cannot keep 3 experts"),
    "groups": (lambda: check_shape(Shape(22, 32), GROUPED, 48), "use 20 or 24"),
    "nothing": (lambda: check_shape(Shape(32, 48), PLAIN, 48), "removes nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name) -> None:
    call, message = REFUSED[name]
    with pytest.raises(PlanError, match=re.escape(message)):
        call()


@pytest.mark.does_not_raise
def test_shapes_that_fit_pass() -> None:
    check_shape(Shape(24, 32), PLAIN, 48)
    check_shape(Shape(16, 48), GROUPED, 48)


def test_expected_error_by_its_formula() -> None:
    stats = rk.LayerStats(4)
    stats.tokens.fill_(100)
    stats.count.copy_(torch.tensor([[80, 60, 40, 20]]))
    stats.weighted_norm_sq_sum.copy_(torch.tensor([[8.0, 6.0, 4.0, 2.0]]))
    down, gram = torch.eye(4).expand(4, 4, 4), torch.eye(4).expand(4, 4, 4)
    order = width_order(down, gram, ridge=0.0)  # each neuron has a quarter of the energy
    assert expected_error(stats, order, range(4), 4, top_k=2) == 0
    assert math.isclose(expected_error(stats, order, range(4), 3, top_k=2), math.sqrt(0.25))
    share, removed = 1 - (1 - 0.1) ** 2, 0.1
    whole = share * math.sqrt(removed / share)
    assert math.isclose(expected_error(stats, order, [0, 1, 2], 4, top_k=2), whole)
    narrow = 0.25 * 0.9
    both = share * math.sqrt(removed / share + narrow) + (1 - share) * math.sqrt(narrow)
    assert math.isclose(expected_error(stats, order, [0, 1, 2], 3, top_k=2), both)


def test_constants_are_weighted_means_of_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    h = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    g = torch.rand(7, generator=generator, dtype=torch.float64)
    sums = rk.LayerGram(2, 3)
    sums.first[1], sums.weight[1] = g.square() @ h, g.square().sum()
    found = expert_constants(list(down), sums, bias)
    trained = expert_constants(torch.nn.Parameter(down), sums, torch.nn.Parameter(bias))
    assert torch.equal(trained, found)
    assert not trained.requires_grad
    expected = g.square() @ (h @ down[1].T + bias[1]) / g.square().sum()
    torch.testing.assert_close(found[1], expected)
    assert found[0].eq(0).all()
    with pytest.raises(ShapeError, match="give those of one layer"):
        expert_constants(down[:1], sums)
