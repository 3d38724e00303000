"""Bits by expert: the least sum of score * 4^-bits, by trying every choice."""

import itertools

import pytest
import torch

from reap_driver.planning.expert_bits import expert_bits
from reap_kernels.errors import PlanError


def cost(scores: dict[str, list[float]], bits: dict[str, tuple[int, ...]]) -> float:
    pairs = zip(itertools.chain(*scores.values()), itertools.chain(*bits.values()), strict=True)
    return sum(score * 4.0**-b for score, b in pairs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("average", [2, 2.5, 3, 3.6, 4])
def test_no_other_choice_costs_less(seed: int, average: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = (torch.rand(6, generator=draw) * 8 - 4).exp().tolist()
    scores = {"a": values[:2], "b": values[2:]}
    found = expert_bits(scores, average, (2, 3, 4))
    each = [*itertools.chain(*found.values())]
    assert [len(found["a"]), len(found["b"])] == [2, 4]
    assert sum(each) == int(average * 6)
    options = itertools.product((2, 3, 4), repeat=6)
    every = [bits for bits in options if sum(bits) <= average * 6]
    least = min(cost(scores, {"a": bits[:2], "b": bits[2:]}) for bits in every)
    assert cost(scores, found) == pytest.approx(least)


def test_equal_scores_get_equal_bits() -> None:
    assert expert_bits({"a": [1.0] * 4}, 3) == {"a": (3, 3, 3, 3)}
    assert expert_bits({"a": [0.0] * 4}, 8) == {"a": (8, 8, 8, 8)}


def test_a_step_that_the_average_has_no_room_for_is_left_out() -> None:
    assert expert_bits({"a": [1e9, 1.0]}, 4) == {"a": (4, 4)}
    assert expert_bits({"a": [1e9, 1.0]}, 5) == {"a": (8, 2)}


def test_averages_outside_the_choices_are_refused() -> None:
    for average in (1.9, 8.1, float("nan")):
        with pytest.raises(PlanError, match=r"give an average from 2 to 8"):
            expert_bits({"a": [1.0]}, average)
