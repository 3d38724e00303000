"""Ranking all layers together: against removing one expert after another, in many random cases."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from reap_driver.planning.allocation import pooled
from reap_driver.planning.budget import Budget, Router
from reap_kernels.errors import PlanError


def facts(experts: int, top_k: int = 1, n_group: int = 1, **more: float) -> dict[str, Any]:
    grouped = {"n_group": n_group, "topk_group": n_group}
    return {"num_experts": experts, "top_k": top_k, **grouped, **more}


def values(*scores: float) -> Tensor:
    return torch.tensor(scores, dtype=torch.float64)


def removed(budgets: list[Budget]) -> dict[str, int]:
    return {budget.name: budget.removed for budget in budgets}


def one_by_one(
    scores: dict[str, Tensor],
    layers: dict[str, dict[str, Any]],
    target: int,
    protected: dict[str, set[int]],
) -> dict[str, int]:
    """Removes the expert with the lowest score that may still go, again and again."""
    alive = {name: set(range(len(each))) for name, each in scores.items()}
    for _ in range(target):
        candidates = [
            (float(scores[name][expert]), name, expert)
            for name, stay in alive.items()
            if len(stay) > max(layers[name]["top_k"], len(protected.get(name, ())))
            for expert in stay - protected.get(name, set())
        ]
        if not candidates:
            break
        _, name, expert = min(candidates)
        alive[name].remove(expert)
    return {name: len(scores[name]) - len(stay) for name, stay in alive.items()}


def test_it_is_removing_the_worst_expert_again_and_again() -> None:
    draw, exact, limited = random.Random(0), 0, 0
    for _ in range(200):
        sizes = {f"l{n}": draw.randint(2, 12) for n in range(draw.randint(1, 5))}
        layers = {name: facts(size, draw.randint(1, size)) for name, size in sizes.items()}
        scores = {
            name: values(*(draw.random() * draw.choice([1, 5]) for _ in range(size)))
            for name, size in sizes.items()
        }
        protected = {
            name: set(draw.sample(range(size), draw.randint(0, size // 2)))
            for name, size in sizes.items()
        }
        total = sum(sizes.values())
        ratio = draw.uniform(1 / total, 0.99)
        expected = one_by_one(scores, layers, int(total * ratio + 1e-9), protected)
        if not any(expected.values()):
            continue
        found = removed(pooled(scores, layers, ratio, protected=protected, normalize="none"))
        assert found == expected
        exact += sum(found.values()) == int(total * ratio + 1e-9)
        limited += sum(found.values()) < int(total * ratio + 1e-9)
    assert exact > 50
    assert limited > 20


def test_routing_groups_lose_one_expert_each_at_a_time() -> None:
    draw = random.Random(1)
    for _ in range(100):
        n_group, size = draw.choice([2, 4]), draw.randint(3, 6)
        layers = {name: facts(n_group * size, 2, n_group) for name in "abc"}
        scores = {name: values(*(draw.random() for _ in range(n_group * size))) for name in "abc"}
        ratio = draw.uniform(0.15, 0.9)
        budgets = pooled(scores, layers, ratio)
        asked, gone = int(3 * n_group * size * ratio), sum(removed(budgets).values())
        assert all(b.removed % n_group == 0 and b.removed <= b.most for b in budgets)
        at_limit = all(b.removed == b.most for b in budgets)
        assert asked - n_group < gone <= asked or (at_limit and gone <= asked)


def test_of_groups_the_mean_of_the_lowest_decides() -> None:
    layers = {name: facts(6, 1, 2) for name in "ab"}
    scores = {"a": values(0, 5, 6, 4, 7, 8), "b": values(1, 5, 6, 2, 7, 8)}  # means 2 and 1.5
    assert removed(pooled(scores, layers, 0.2, normalize="none")) == {"a": 0, "b": 2}


def test_equal_scores_take_turns() -> None:
    layers = {f"l{n}": facts(8) for n in range(4)}
    equal = {name: torch.zeros(8).double() for name in layers}
    assert removed(pooled(equal, layers, 0.5)) == dict.fromkeys(layers, 4)
    # Two more go from the last layers.
    assert removed(pooled(equal, layers, 18 / 32)) == {"l0": 4, "l1": 4, "l2": 5, "l3": 5}


def test_normalizing_compares_experts_with_their_neighbors() -> None:
    layers = {"shallow": facts(4), "deep": facts(4)}
    scores = {"shallow": values(1, 2, 3, 4), "deep": values(10, 40, 50, 60)}
    assert removed(pooled(scores, layers, 0.375, normalize="none")) == {"shallow": 3, "deep": 0}
    # By means: 0.4 0.8 1.2 1.6 beside 0.25 1 1.25 1.5.
    assert removed(pooled(scores, layers, 0.375)) == {"shallow": 2, "deep": 1}
    assert removed(pooled(scores, layers, 0.375)) == removed(
        pooled(scores, layers, 0.375, normalize="mean")
    )
    # By maxima: 0.25 0.5 0.75 1 beside 0.17 0.67 0.83 1.
    assert removed(pooled(scores, layers, 0.375, normalize="max")) == {"shallow": 2, "deep": 1}
    assert removed(pooled(scores, layers, 0.5, normalize="max")) == {"shallow": 2, "deep": 2}
    assert removed(pooled(scores, layers, 0.5)) == {"shallow": 2, "deep": 2}


def test_a_factor_after_the_experts_counts_between_layers() -> None:
    scores = {"a": values(1, 2, 3, 4), "b": values(1.5, 2.5, 3.5, 4.5)}
    plain = {"a": facts(4), "b": facts(4)}
    assert removed(pooled(scores, plain, 0.5, normalize="none")) == {"a": 2, "b": 2}
    scaled = {"a": facts(4, scale=2.5), "b": facts(4, scale=1.0)}  # 2.5 5 7.5 10
    assert removed(pooled(scores, scaled, 0.5, normalize="none")) == {"a": 1, "b": 3}
    for normalize in ("mean", "max"):  # the factor cancels
        assert removed(pooled(scores, scaled, 0.5, normalize=normalize)) == removed(
            pooled(scores, plain, 0.5, normalize=normalize)
        )


def test_layers_with_ratios_of_their_own_are_not_in_the_pool() -> None:
    layers = {name: facts(8) for name in "abc"}
    scores = {name: torch.arange(8).double() * 10**place for place, name in enumerate("abc")}
    budgets = pooled(scores, layers, 0.5, layer_ratios={"a": 0, "c": 0.25}, normalize="none")
    assert removed(budgets) == {"a": 0, "b": 4, "c": 2}
    every = pooled(scores, layers, 0.5, layer_ratios={"a": 0.25, "b": 0.5, "c": 0.75})
    assert removed(every) == {"a": 2, "b": 4, "c": 6}


def test_a_layer_never_loses_what_its_router_or_protection_needs() -> None:
    layers = {"a": facts(8, 3), "b": facts(8, 3)}
    scores = {"a": torch.arange(8).double(), "b": torch.arange(8).double() + 100}
    assert removed(pooled(scores, layers, 0.6, normalize="none")) == {"a": 5, "b": 4}
    protected = {"a": {0, 1, 2, 3}}
    budgets = pooled(scores, layers, 0.5, normalize="none", protected=protected)
    assert removed(budgets) == {"a": 4, "b": 4}
    assert [budget.protected for budget in budgets] == [frozenset({0, 1, 2, 3}), frozenset()]


@pytest.mark.parametrize(
    ("layer", "ratio", "more", "says"),
    [
        (facts(8), 0, {}, "ratio 0 is not the share"),
        (
            facts(8),
            0.5,
            {"normalize": "sum"},
            "normalize 'sum' is unknown; choose one of mean, max",
        ),
        (
            facts(8),
            0.05,
            {},
            "0.05 of the 16 experts of all layers removes none; use a ratio of 0.0625 or more",
        ),
        (facts(8, 8), 0.5, {}, "removes none; protect fewer experts, or leave the model"),
        (
            facts(8, 2),
            0.5,
            {"layer_ratios": {"a": 0.9}},
            "0.9 of the 8 .* a leaves 1, but .* chooses 2",
        ),
        (facts(8, 2), 0.5, {"layer_ratios": {"a": 0.05}}, "ratio 0.05 .* layer a removes none"),
        (facts(8), 0.5, {"layer_ratios": {"a": 1.5}}, "ratio 1.5 is not the share"),
    ],
)
def test_refusals(layer: dict[str, Any], ratio: float, more: dict[str, Any], says: str) -> None:
    scores = {name: torch.arange(8).double() for name in "ab"}
    with pytest.raises(PlanError, match=says):
        pooled(scores, {"a": layer, "b": layer}, ratio, **more)


def test_no_layers() -> None:
    with pytest.raises(PlanError, match="no layer to plan"):
        pooled({}, {}, 0.5)


def test_the_most_a_layer_can_lose() -> None:
    assert Router("a", 8, 3, 1, 1).most() == 5
    assert Router("a", 8, 3, 1, 1).most({0, 1, 2, 3, 7}) == 3
    assert Router("a", 16, 2, 4, 2).most() == 8  # the best two of a group score it
    assert Router("a", 16, 6, 4, 2).most() == 4  # six from two groups: three in each
    assert Router("a", 16, 2, 4, 2).most({0, 1, 2, 15}) == 4  # three stay in group 0, so in all
    assert Router("a", 16, 2, 4, 2).most(range(4)) == 0
