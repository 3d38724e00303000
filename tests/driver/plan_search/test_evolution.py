"""Budgets keep their sum and limits; the seed and the fitness values determine a search."""

import itertools
from collections.abc import Sequence
from random import Random

import pytest

from reap_driver.plan_search.evolution import Settings, best_of, evolve
from reap_driver.plan_search.space import MOST_MOVED, MOST_MOVES, Removals, Space, shapes
from reap_kernels.errors import PlanError


def space_of(*layers: tuple[int, int], step: int = 1, fixed: Sequence[int] = ()) -> Space:
    """A space from each layer's (uniform, most) removals."""
    names = [f"l{i}" for i in range(len(layers))]
    uniform, most = (dict(zip(names, part, strict=True)) for part in zip(*layers, strict=True))
    return Space.around(uniform, most, dict.fromkeys(names, step), {f"l{i}" for i in fixed})


SPACES = {
    "two layers": space_of((4, 5), (4, 5)),
    "of different sizes": space_of((2, 6), (32, 56), (8, 14)),
    "many": space_of(*[(64, 120)] * 48),
    "groups": space_of(*[(32, 48)] * 6, step=8),
    "groups of some": Space.around(
        {"a": 5, "b": 8, "c": 6}, {"a": 12, "b": 12, "c": 7}, {"a": 1, "b": 4, "c": 1}
    ),
    "bounded": space_of((2, 6), (2, 2), (2, 3), (2, 6)),
    "with a fixed layer": space_of((2, 6), (3, 6), (2, 6), fixed=[1]),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_candidates_keep_sum_and_limits(space: Space) -> None:
    first = space.first(32, Random(1))
    assert first[0] == space.uniform
    assert len(set(first)) == len(first)
    draw, removals = Random(2), space.uniform
    for removals in [*first, *(removals := space.mutated(removals, draw) for _ in range(500))]:
        assert space.contains(removals), removals


def test_limits_are_those_of_routing_groups_and_layers() -> None:
    assert not SPACES["groups"].contains((31, 33, 32, 32, 32, 32))
    assert SPACES["groups"].contains((24, 40, 32, 32, 32, 32))
    mixed = SPACES["groups of some"]
    assert (mixed.least, mixed.most, mixed.step) == ((1, 0, 2), (9, 12, 6), 4)
    bounded = SPACES["bounded"]
    assert not bounded.contains((1, 3, 2, 2))
    assert not bounded.contains((2, 2, 2, 1))
    assert not SPACES["with a fixed layer"].contains((1, 4, 2))


def test_a_mutation_moves_few_experts() -> None:
    space, draw = SPACES["many"], Random(3)
    moved = []
    for _ in range(300):
        child = space.mutated(space.uniform, draw)
        moved.append(sum(max(0, a - b) for a, b in zip(child, space.uniform, strict=True)))
    assert min(moved) == 1
    assert MOST_MOVED < max(moved) <= MOST_MOVED * MOST_MOVES


def test_shapes_are_what_they_are_called() -> None:
    up, down, triangle, valley, front, back, early, late, stripes = shapes(8)
    assert up == sorted(up) == down[::-1]
    assert triangle[0] == triangle[-1] < triangle[3]
    assert valley[0] == valley[-1] > valley[3]
    assert front == sorted(back, reverse=True)
    assert early == late[::-1] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert stripes[::2] == [2] * 4
    assert stripes[1::2] == [1] * 4
    assert all(len(shape) == 1 for shape in shapes(1))


def test_sharing_out_is_proportional_up_to_the_limits() -> None:
    space = space_of(*[(30, 90)] * 3)
    assert space.shared_out([1, 1, 1]) == (30, 30, 30)
    assert space.shared_out([1, 2, 3]) == (15, 30, 45)
    assert space.shared_out([1, 1, 1000]) == (0, 0, 90)
    assert space_of(*[(30, 40)] * 3).shared_out([1, 1, 1000]) == (25, 25, 40)


@pytest.mark.parametrize("layers", [[(4, 5)], [(4, 4), (4, 4)], [(0, 0), (4, 8)]])
def test_where_nothing_can_be_moved_there_is_no_search(layers: list[tuple[int, int]]) -> None:
    with pytest.raises(PlanError, match=r"no budget but the uniform one removes .*another ratio"):
        space_of(*layers)


def hills(removals: Removals) -> float:
    """A fitness with one maximum and a rough surface."""
    wanted = (14, 4, 8, 6)
    return -sum((a - b) ** 2 for a, b in zip(removals, wanted, strict=True)) + removals[0] % 2 / 4


SPACE = space_of(*[(8, 14)] * 4)
SMALL = Settings(evaluations=120, population=12, elites=3, seed=5)


class Counted:
    """A fitness that records the candidates it was called with."""

    def __init__(self) -> None:
        self.calls: list[Removals] = []

    def __call__(self, removals: Removals) -> float:
        self.calls.append(removals)
        return hills(removals)


def test_finds_the_best_and_evaluates_nothing_twice() -> None:
    fitness = Counted()
    evaluated = evolve(SPACE, fitness, SMALL)
    assert len(fitness.calls) == len(set(fitness.calls)) == len(evaluated) == 120
    assert list(evaluated) == fitness.calls
    assert fitness.calls[0] == SPACE.uniform
    assert all(SPACE.contains(removals) for removals in evaluated)
    assert best_of(evaluated, 1) == [(14, 4, 8, 6)]


def test_a_seed_decides_the_course() -> None:
    once, again = evolve(SPACE, hills, SMALL), evolve(SPACE, hills, SMALL)
    assert list(once.items()) == list(again.items())
    other = evolve(SPACE, hills, Settings(evaluations=120, population=12, elites=3, seed=6))
    assert list(other) != list(once)


def test_the_course_is_the_same_on_every_machine() -> None:
    """Recorded values: every Python version and processor must draw the same."""
    evaluated = list(evolve(SPACE, hills, SMALL))
    assert evaluated[10:13] == [(13, 10, 3, 6), (3, 4, 14, 11), (12, 10, 6, 4)]
    assert evaluated[-1] == (5, 13, 8, 6)


def test_more_evaluations_go_on_where_fewer_ended() -> None:
    short = evolve(SPACE, hills, Settings(evaluations=50, population=12, elites=3, seed=5))
    assert list(evolve(SPACE, hills, SMALL))[:50] == list(short)


def test_ends_where_everything_is_known() -> None:
    space = SPACES["two layers"]
    evaluated = evolve(space, lambda removals: float(removals[0]), Settings(evaluations=500))
    everything = [
        (a, b) for a, b in itertools.product(range(9), repeat=2) if space.contains((a, b))
    ]
    assert sorted(evaluated) == everything == [(3, 5), (4, 4), (5, 3)]


def test_generations_are_told() -> None:
    fitness, sizes = Counted(), []
    evolve(SPACE, fitness, SMALL, generation_done=lambda: sizes.append(len(fitness.calls)))
    assert sizes == [12, *range(21, 120, 9), 120]


def test_equals_rank_by_age() -> None:
    assert best_of({(1, 2): 0.5, (2, 1): 0.5, (0, 3): 0.7}, 2) == [(0, 3), (1, 2)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"elites": 32}, "32 elites in a population of 32 leave no room"),
        ({"elites": 0}, "0 elites in a population of 32"),
        ({"evaluations": 0}, "evaluations=0 is below 1; use 1 or more"),
    ],
)
def test_settings_that_make_no_search(options: dict[str, int], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Settings(**options)
