"""Allocation: how many experts go, and which, as properties over many layers and ratios."""

import random
import re
from fractions import Fraction

import pytest
import torch

from reap_driver.planning.allocation import explicit, max_removable, removal_steps, uniform
from reap_driver.planning.budget import kept_experts, ratio_of
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.planning.planner import make_plan
from reap_driver.planning.serving import is_served, served_advice
from reap_kernels.errors import PlanError

PUBLISHED = [(288, 0.4, 173), (128, 0.25, 96), (160, 0.5, 80), (512, 0.5, 256), (100, 0.29, 71)]


def facts(experts: int, top_k: int = 1, n_group: int = 1, topk_group: int = 1) -> dict[str, int]:
    return {
        "num_experts": experts,
        "top_k": top_k,
        "n_group": n_group,
        "topk_group": topk_group,
    }


@pytest.mark.parametrize(("experts", "ratio", "kept"), PUBLISHED)
def test_counts_as_published_checkpoints_do(experts: int, ratio: float, kept: int) -> None:
    [budget] = uniform({"a": facts(experts)}, ratio)
    assert experts - budget.removed == kept


def test_the_count_is_the_floor_of_the_exact_product() -> None:
    """Also where binary floating point falls short of it, as 100 * 0.29 does."""
    for experts in range(2, 600, 7):
        for percent in range(1, 100):
            asked = int(Fraction(percent, 100) * experts)
            if 0 < asked < experts:
                [budget] = uniform({"a": facts(experts)}, percent / 100)
                assert (budget.removed, budget.asked) == (asked, asked)


def test_a_fraction_that_means_whole_experts_removes_them() -> None:
    for experts in range(2, 300):
        for removed in {1, experts // 3, experts // 2, experts - 1} - {0}:
            [budget] = uniform({"a": facts(experts)}, removed / experts)
            assert budget.removed == removed


def test_properties_of_every_allocation() -> None:
    draw, planned = random.Random(0), 0
    for _ in range(300):
        n_group = draw.choice([1, 1, 2, 4, 8])
        size = draw.randint(1, 32)
        topk_group = draw.randint(1, n_group)
        top_k = draw.randint(1, min(8, topk_group * size))
        experts, ratio = n_group * size, draw.uniform(0.01, 0.99)
        scores = torch.tensor([draw.choice([0, 1, draw.random()]) for _ in range(experts)]).double()
        protected = set(draw.sample(range(experts), draw.choice([0, 0, experts // 3])))
        layers = {"a": facts(experts, top_k, n_group, topk_group)}
        try:
            [budget] = uniform(layers, ratio, protected={"a": protected})
        except PlanError:
            continue
        planned += 1
        kept = kept_experts(scores, budget)
        assert list(kept) == sorted(set(kept))
        assert len(kept) == experts - budget.removed >= top_k
        assert 0 < budget.removed <= experts * ratio + 1e-9
        removed = set(range(experts)) - set(kept)
        for group in range(n_group):
            inside = range(group * size, (group + 1) * size)
            stay, go = [e for e in kept if e in inside], [e for e in removed if e in inside]
            assert len(stay) == len(kept) // n_group
            assert len(stay) * topk_group >= top_k
            # Whoever goes scores no better than who stays; between equals the lower index stays.
            assert not protected & set(go)
            for a in set(stay) - protected:
                assert all((scores[a], -a) > (scores[b], -b) for b in go)
            if n_group > 1:
                assert len(stay) >= min(2, size)
    assert planned > 100


def test_ties_keep_the_lower_index() -> None:
    [budget] = uniform({"a": facts(8)}, 0.5)
    assert kept_experts(torch.zeros(8).double(), budget) == (0, 1, 2, 3)
    [budget] = uniform({"a": facts(8, n_group=2)}, 0.5)
    assert kept_experts(torch.zeros(8).double(), budget) == (0, 1, 4, 5)


def test_groups_round_down_to_equal_counts() -> None:
    [budget] = uniform({"a": facts(256, 8, 8, 4)}, 0.4)  # 102 asked, 96 is the next multiple of 8
    assert (budget.asked, budget.removed) == (102, 96)


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.25, float("nan")])
def test_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(PlanError, match=r"ratio .* above 0 and below 1"):
        uniform({"a": facts(8)}, ratio)


@pytest.mark.parametrize(
    ("layer", "ratio", "says"),
    [
        (facts(8, 3), 0.75, r"0.75 of the 8 experts of layer a leaves 2.*chooses 3.*to 0.625"),
        (facts(8, 3), 0.1, r"layer a removes none.*from 0.125 to 0.625"),
        (facts(16, 6, 4, 2), 0.5, r"leaves 8.*chooses 6 experts from 2 of 4 groups.*to 0.25"),
        (facts(16, 2, 4, 2), 0.75, r"leaves 4.*to 0.5"),  # the best two of a group score it
        (facts(16, 2, 4, 2), 0.2, r"removes none \(4 routing groups of equal size\).*from 0.25"),
        (facts(4, 4), 0.5, r"this model cannot lose experts"),
        (facts(10, 2, 4, 2), 0.5, r"10 experts do not divide into 4 routing groups"),
        ({"num_experts": 8}, 0.5, r"a: .* record 'top_k'; .*say how it routes: provenance"),
    ],
)
def test_what_a_router_cannot_lose(layer: dict[str, int], ratio: float, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        uniform({"a": layer}, ratio)


def test_the_ratios_a_refusal_offers_work() -> None:
    for layer in (facts(8, 3), facts(16, 6, 4, 2), facts(256, 8, 8, 4)):
        with pytest.raises(PlanError) as caught:
            uniform({"a": layer}, 0.999)
        low, high = (float(word) for word in str(caught.value).rpartition("from ")[2].split(" to "))
        for ratio in (low, high):
            uniform({"a": layer}, ratio)


def test_a_ratio_in_few_digits_removes_exactly_so_many() -> None:
    for experts in (8, 60, 72, 128, 160, 256, 288, 384, 512):
        for removed in range(1, experts):
            [budget] = uniform({"a": facts(experts)}, ratio_of(removed, experts))
            assert budget.removed == removed


@pytest.mark.parametrize(
    ("layer", "ratio", "advice"),
    [
        (facts(128), 0.5, None),
        (
            facts(288),
            0.4,
            "keeps 173 of 288 experts in a layer, .* 128 .ratio 0.5556. or 192",
        ),
        (facts(24, n_group=3), 0.5, "it takes none that this layer can be left with$"),
        (facts(6), 0.5, "keeps 3 of 6 experts in a layer, .* 2 .ratio 0.6667. or 4 .ratio"),
        (facts(6, 3), 0.5, "takes 4 .ratio 0.3334.$"),  # two are fewer than the router chooses
    ],
)
def test_numbers_of_experts_that_engines_refuse(
    layer: dict[str, int], ratio: float, advice: str | None
) -> None:
    """Only the router of one model refuses any; the numbers offered in their place are taken."""
    layers = {"a": layer, "b": layer}
    scores = {name: torch.arange(float(layer["num_experts"])) for name in layers}
    for kind, said in {"deepseek_v4": advice, "step3p5": None}.items():
        record = {"model": {"model_type": kind}, "layers": layers}
        found = served_advice(make_plan(scores, ratio, criterion="x", of=record), layers)
        assert len(found) == (said is not None)
        assert said is None or re.search(said, found[0])
        for kept, offered in re.findall(r"(\d+) \(ratio ([\d.]+)\)", " ".join(found)):
            [budget] = uniform({"a": layer}, float(offered))
            assert budget.num_experts - budget.removed == int(kept)
            assert is_served(int(kept), kind)
    assert not any(is_served(n, "deepseek_v4") for n in (3, 48, 160, 173, 640))


def test_widths_that_fewer_gpus_can_divide_are_said() -> None:
    def advice(before: int, after: int) -> list[str]:
        cut = LayerPlan.keeping(4, (0, 2), before, (tuple(range(after)),) * 2)
        plan = Plan({}, "x", "uniform", 0.5, {"a": cut, "b": cut}, "sha256:0")
        return served_advice(plan, {})

    assert advice(768, 512) == advice(768, 448) == advice(48, 32) == advice(24, 24) == []
    [said] = advice(768, 520)
    assert "leaves 520 of 768 neurons" in said
    assert "at most 8 GPUs" in said
    assert "grouped" not in said
    [odd] = advice(768, 500)
    assert "at most 4 GPUs" in odd
    assert "transformers' grouped products a multiple of 8" in odd


def test_layers_can_have_ratios_of_their_own() -> None:
    layers = {name: facts(8, 2) for name in "abc"}
    budgets = uniform(layers, 0.5, layer_ratios={"a": 0, "c": 0.25})
    assert [budget.removed for budget in budgets] == [0, 4, 2]
    with pytest.raises(PlanError, match=r"ratio 0.9 of the 8 experts of layer b leaves 1"):
        uniform(layers, 0.5, layer_ratios={"b": 0.9})


@pytest.mark.parametrize(
    ("protected", "says"),
    [
        (range(5), r"leaves 4, but 5 of its experts are protected; use a ratio .* to 0.375"),
        (range(8), r"leaves 4, but 8 of its .*; protect fewer of its experts, or give .* ratio 0"),
    ],
)
def test_protected_experts_limit_what_a_layer_can_lose(protected: range, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        uniform({"a": facts(8, 2)}, 0.5, protected={"a": protected})


def test_removals_layer_by_layer() -> None:
    layers = {"a": facts(8, 3), "b": facts(16, 2, 4, 2), "c": facts(4, 4)}
    assert removal_steps(layers) == {"a": 1, "b": 4, "c": 1}
    assert max_removable(layers) == {"a": 5, "b": 8, "c": 0}
    assert max_removable(layers, {"a": {1, 2, 5, 6}}) == {"a": 4, "b": 8, "c": 0}
    for removals in ({"a": 5, "b": 8, "c": 0}, {"b": 0, "a": 1, "c": 0}):
        budgets = explicit(layers, removals, protected={"a": {7}})
        assert {budget.name: budget.removed for budget in budgets} == removals
        assert budgets[0].protected == {7}


@pytest.mark.parametrize(
    ("removals", "says"),
    [
        ({"a": 1}, r"removals name no layers that there are not, and leave out \['b'\]"),
        ({"a": 1, "b": 0, "z": 0}, r"removals name \['z'\] layers that there are not"),
        ({"a": 6, "b": 0}, r"6 of the 8 experts of layer a leaves 2, .* 3 .*; remove from 0 to 5$"),
        ({"a": -1, "b": 0}, r"removing -1 of the 8 experts of layer a is no number of experts"),
        ({"a": 0, "b": 6}, r"removing 6 .* b is no multiple of its 4 .* 0 to 8 in steps of 4"),
    ],
)
def test_removals_that_cannot_be(removals: dict[str, int], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        explicit({"a": facts(8, 3), "b": facts(16, 2, 4, 2)}, removals)


def test_scores_of_another_model_are_refused() -> None:
    [budget] = uniform({"a": facts(8)}, 0.5)
    with pytest.raises(PlanError, match=r"layer a: scores have shape \(6,\), expected \(8,\)"):
        kept_experts(torch.zeros(6).double(), budget)


def test_no_layers() -> None:
    with pytest.raises(PlanError, match="no layer to plan"):
        uniform({}, 0.5)
