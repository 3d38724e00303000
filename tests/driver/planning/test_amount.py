"""How much is removed: what keeps N experts, ratios that differ, and the search for a size."""

import random
import re

import pytest
import torch

from reap_driver.planning.allocation import pooled, uniform
from reap_driver.planning.amount import keeping, possible_ratios, smallest_within
from reap_driver.planning.budget import Router, ratio_of
from reap_driver.planning.plan import Plan
from reap_kernels.errors import PlanError
from tests.driver.planning.test_allocate import facts


def routers(**shapes: tuple[int, int, int, int]) -> tuple[list[Router], dict[str, dict[str, int]]]:
    """Layers of (experts, top_k, n_group, topk_group), as routers and as facts."""
    known = {name: facts(*shape) for name, shape in shapes.items()}
    return [Router.of(name, layer) for name, layer in known.items()], known


def test_keeping_a_number_removes_exactly_the_rest() -> None:
    tried = 0
    for experts in (8, 60, 64, 128, 160, 256, 288, 384, 512):
        found, known = routers(a=(experts, 2, 1, 1), b=(experts, 8, 1, 1))
        for keep in range(8, experts):
            amount = keeping(found, keep, {})
            assert amount.asked == {"keep": keep}
            assert {b.kept for b in uniform(known, amount.ratio)} == {keep}
            tried += 1
    assert tried > 1000


@pytest.mark.parametrize(
    ("shapes", "keep", "protected", "says"),
    [
        ({"a": (8, 3, 1, 1)}, 2, {}, "`keep=2` of the 8 experts of layer a leaves 2, but the router"
         " chooses 3 experts; give 3"),
        ({"a": (8, 3, 1, 1)}, 8, {}, "`keep=8` of 8 experts removes none; give 7"),
        ({"a": (8, 3, 1, 1)}, 90, {}, "`keep=90` of 8 experts removes none; give 7"),
        ({"a": (16, 3, 4, 2)}, 9, {}, "`keep=9` is no multiple of the 4 routing groups of layer a; "
         "give 8 or 12"),
        ({"a": (16, 3, 4, 2)}, 4, {}, "`keep=4` of the 16 experts of layer a leaves 4, but the "
         "router chooses 3 experts from 2 of 4 groups; give 8"),
        ({"a": (8, 2, 1, 1)}, 3, {"a": {1, 2, 3, 4}}, "leaves 3, but 4 of its experts are "
         "protected; give 4"),
        ({"a": (8, 2, 1, 1), "b": (16, 2, 1, 1)}, 4, {}, "`keep=4`: layers have 8 or 16 experts, "
         "and one ratio cannot leave all of them the same number; give `ratio`"),
        ({"a": (2, 2, 1, 1)}, 1, {}, "but the router chooses 2 experts; this model cannot lose"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_kept(
    shapes: dict[str, tuple[int, int, int, int]],
    keep: int,
    protected: dict[str, set[int]],
    says: str,
) -> None:
    with pytest.raises(PlanError, match=re.escape(says)):
        keeping(routers(**shapes)[0], keep, protected)


def test_possible_ratios_are_all_that_differ() -> None:
    """By trying every ratio of four decimals."""
    for shape in ((16, 3, 1, 1), (16, 3, 4, 2)):
        found, known = routers(a=shape, b=(24, 3, 1, 1))
        kept, first = {}, []
        for number in range(1, 10_000):
            try:
                budgets = uniform(known, number / 1e4)
            except PlanError:
                continue
            counts = tuple(budget.kept for budget in budgets)
            if kept.get("last") != counts:
                first.append(number / 1e4)
            kept["last"] = counts
        assert possible_ratios(found, {}, together=False) == first


def test_possible_ratios_of_all_layers_together() -> None:
    found, known = routers(a=(8, 2, 1, 1), b=(8, 3, 1, 1))
    ratios = possible_ratios(found, {"a": {0, 1, 2}}, together=True)
    assert ratios == [ratio_of(n, 16) for n in range(1, 11)]  # 5 of each layer
    scores = {name: torch.arange(8.0) + 1 for name in known}
    kept = {"a": (0, 1, 2)}
    removed = [sum(b.removed for b in pooled(scores, known, r, protected=kept)) for r in ratios]
    assert removed == list(range(1, 11))


def test_without_a_ratio_that_suits_every_layer_there_is_an_error() -> None:
    with pytest.raises(PlanError, match="no ratio removes experts of every layer"):
        possible_ratios(routers(a=(8, 8, 1, 1))[0], {}, together=False)
    with pytest.raises(PlanError, match="no ratio removes experts of every layer"):
        possible_ratios([], {}, together=True)


def test_the_smallest_within_a_limit_is_that_of_trying_all() -> None:
    draw = random.Random(0)
    for _ in range(500):
        steps = sorted(draw.sample(range(1, 1000), draw.randint(1, 60)))
        ratios = [step / 1000 for step in steps]
        sizes = sorted((draw.randint(1, 10**6) for _ in steps), reverse=True)
        whole = sizes[0] + draw.randint(1, 10**5)
        limit = draw.randint(0, whole - 1)
        found = smallest_within(
            ratios, dict(zip(ratios, sizes, strict=True)).__getitem__, limit, whole
        )
        within = [ratio for ratio, size in zip(ratios, sizes, strict=True) if size <= limit]
        assert found == (min(within) if within else None)


def test_few_sizes_are_computed_where_they_fall_evenly() -> None:
    ratios = [ratio_of(n, 384) for n in range(1, 377)]
    for limit in range(10**6, 40 * 10**6, 10**6 + 1):
        computed: list[float] = []

        def size(ratio: float, computed: list[float] = computed) -> int:
            computed.append(ratio)
            return 2_000_000 + round((1 - ratio) * 384) * 100_000 + len(str(ratio))

        smallest_within(ratios, size, limit, 2_000_000 + 384 * 100_000)
        assert len(computed) <= 5


def test_plans_say_what_was_asked_for() -> None:
    empty = {"model": {}, "criterion": "x", "allocation": "uniform", "ratio": 0.5, "layers": {}}
    words = [
        ({}, None),
        ({"keep": 32}, "32 experts in every layer"),
        ({"target_size": 12 * 10**9}, "weight files of at most 12.0 GB"),
        (
            {"fits": 16 * 10**9, "context": 8192},
            "weights and the cache of 8,192 tokens in 16.0 GB of memory",
        ),
    ]
    for settings, text in words:
        assert Plan(**empty, scores_digest="", settings=settings).asked == text  # type: ignore[arg-type]
