"""The numbers of a report equal sums that the tests write out."""

import math

import pytest
import torch

from reap_driver.planning.scoring import score
from reap_driver.reporting.groups import (
    best_as_many,
    most_specialized,
    parts,
    reweighted,
    specialized,
)
from reap_driver.reporting.measures import NEAR, Cut, LayerMeasures, measure
from tests.driver.reporting.conftest import GROUPS, LAYERS, Make


def layer_of(count: list[int], mass: list[list[float]]) -> LayerMeasures:
    """A layer with these loads and this routing mass by group."""
    scores = torch.tensor(count, dtype=torch.float64)
    return LayerMeasures(
        name="a.0.b",
        label="0",
        scores=scores,
        count=torch.tensor(count),
        mass=torch.tensor(mass, dtype=torch.float64),
        cut=Cut.of(scores, [0, 1], None),
        retained=None,
        retained_by_group=[],
        n_group=1,
    )


def test_a_cut_lies_between_the_last_kept_and_the_first_removed_expert() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0], dtype=torch.float64)
    cut = Cut.of(scores, [0, 2], None)
    assert cut.score == 3.5
    assert cut.gap == pytest.approx(1 / 4)
    assert cut.order.tolist() == [0, 2, 3, 4, 1]
    assert (cut.lowest_kept, cut.highest_removed, cut.exceptions) == (2, 3, 0)
    assert cut.near == 0


def test_a_plan_may_keep_others_than_the_best() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 3.0], dtype=torch.float64)
    cut = Cut.of(scores, [0, 1], None)
    assert cut.exceptions == 1  # the expert that scored 4 is removed
    assert cut.order.tolist() == [0, 1, 2, 3]
    assert (cut.lowest_kept, cut.highest_removed) == (1, 2)


def test_experts_near_the_cut_are_counted_on_both_sides() -> None:
    inside, outside = 1 + 0.9 * NEAR, 1 + 1.1 * NEAR
    scores = torch.tensor([2.0, outside, inside, 1.01, 0.99, 2 - inside, 2 - outside])
    cut = Cut.of(scores.double(), [0, 1, 2, 3], None)
    assert (cut.near_kept, cut.near_removed) == (2, 2)


def test_the_decision_margin_takes_precedence_over_nearness() -> None:
    cut = Cut.of(torch.tensor([4.0, 3.0, 2.0, 1.0]).double(), [0, 1], [0, 1, 2])
    assert (cut.near_kept, cut.near_removed) == (2, 1)


@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 1]])
def test_a_layer_that_keeps_all_or_scores_nothing_has_no_gap(kept: list[int]) -> None:
    cut = Cut.of(torch.zeros(3, dtype=torch.float64), kept, None)
    assert cut.gap is None
    assert cut.near == 0
    assert (cut.highest_removed is None) is (len(kept) == 3)


@pytest.mark.parametrize(
    ("count", "gini"), [([7, 7, 7, 7], 0.0), ([0, 0, 0, 9], 0.75), ([1, 3], 0.25), ([0, 0], 0.0)]
)
def test_gini(count: list[int], gini: float) -> None:
    assert layer_of(count, [[1.0] * len(count)]).gini == pytest.approx(gini)


def test_load_is_relative_to_the_layers_mean() -> None:
    layer = layer_of([6, 0, 2, 0], [[1.0] * 4])
    assert layer.load.tolist() == [3, 0, 1, 0]
    assert (layer.max_load, layer.dead) == (3, 2)


def test_layers_are_called_by_their_number(make: Make) -> None:
    stats, plan = make()
    assert [layer.label for layer in measure(stats, score(stats), plan)] == ["3", "4", "5"]
    towers = [f"{tower}.layers.0.experts" for tower in ("text", "vision", "audio")]
    stats.layers = dict(zip(towers, stats.layers.values(), strict=True))
    renamed = dict(zip(towers, score(make()[0]).values(), strict=True))
    scores = score(make()[0])
    scores.clear()
    scores.update(renamed)
    assert [layer.label for layer in measure(stats, scores, None)] == ["0", "1", "2"]


def test_the_mass_kept_is_that_of_the_kept_experts(make: Make) -> None:
    stats, plan = make()
    for layer in measure(stats, score(stats), plan):
        gates, kept = stats.layers[layer.name].router_weight_sum, list(plan.layers[layer.name].kept)
        assert layer.retained == pytest.approx(float(gates[:, kept].sum() / gates.sum()))
        for group, share in enumerate(layer.retained_by_group):
            assert share == pytest.approx(float(gates[group, kept].sum() / gates[group].sum()))


def test_parts_weight_groups_equally() -> None:
    layer = layer_of([1000, 1000], [[90.0, 10.0], [1.0, 1.0]])
    assert parts(layer)[0].tolist() == pytest.approx([0.9 / 1.4, 0.1 / 0.6])
    assert parts(layer).sum(0).tolist() == pytest.approx([1, 1])


def test_specialists_need_rows() -> None:
    layer = layer_of([1000, 1000, 50], [[9.0, 1.0, 0.0], [1.0, 9.0, 9.0]])
    assert specialized(layer).tolist() == [[True, False, False], [False, True, False]]
    [code, tools] = most_specialized([layer], GROUPS, 1)
    assert (code.group, code.expert, code.kept) == ("code", 0, True)
    assert (tools.group, tools.expert, tools.rows) == ("tools", 1, 1000)
    assert code.share == pytest.approx(0.9)


def test_other_weights_replace_the_experts_they_rank_lower(make: Make) -> None:
    stats, plan = make()
    layers = measure(stats, score(stats), plan)
    other = score(stats, "reap", {"code": 1.0, "tools": 0.0})
    [same, changed] = reweighted(layers, {"same": score(stats), "code": other})
    assert same.changed == 0
    lost = 0
    for name in LAYERS:
        kept = plan.layers[name].kept
        best = other[name].argsort(descending=True)[: len(kept)].tolist()
        lost += len(set(kept) - set(best))
    assert changed.changed == lost
    assert changed.kept == 9
    assert not math.isnan(changed.worst_share)


def test_routing_groups_keep_their_numbers() -> None:
    kept = torch.tensor([True, False, False, True, True, False])
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert best_as_many(scores, kept, 2) == [2, 5, 4]
    assert best_as_many(scores, kept, 1) == [5, 4, 3]
