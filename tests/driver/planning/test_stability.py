"""Uncertainty: the jackknife against leaving parts out by hand, and its promises by simulation."""

import functools
import math
import random

import pytest
import torch
from torch import Tensor

from reap_driver.planning.budget import Router, kept_experts
from reap_driver.planning.planner import make_plan, plan_of_removals
from reap_driver.planning.scoring import score
from reap_driver.planning.stability import (
    Uncertainty,
    group_scores,
    halves,
    keep_probability,
    margin,
    rank_correlation,
    uncertainty,
)
from reap_driver.planning.student_t import normal
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import DataError, PlanError
from tests.driver.planning.statistics import EXPERTS, MODEL, NEVER, Rows, in_parts, model_stats

PARTS = 6


def sampled(tokens: int | None = 50, groups: int = 2, **facts: int) -> SaliencyStats:
    """Statistics in six parts of two layers; with as many tokens in each, or not."""
    parts = []
    for part in range(PARTS):
        rows = {name: Rows(groups, 10 * part + place) for place, name in enumerate("ab")}
        for each in rows.values():
            each.tokens[:] = each.tokens if tokens is None else tokens
        parts.append(model_stats(rows, ["x", "y"][:groups], **facts))
    return in_parts(parts)


@pytest.mark.parametrize("criterion", ["reap", "msan", "S(0.5,1,1)"])
@pytest.mark.parametrize("weights", [None, {"x": 1, "y": 3}])
def test_the_error_is_the_jackknife_of_equal_parts(
    criterion: str, weights: dict[str, float] | None
) -> None:
    stats = sampled()
    found = uncertainty(stats, criterion, weights)
    power = {"S(0.5,1,1)": 0.5}.get(criterion, 1.0)
    for name, one in found.items():
        assert torch.equal(one.scores, score(stats, criterion, weights)[name])
        without = []
        for part in range(PARTS):
            others = [other for place, other in enumerate(stats.parts) if place != part]
            rest = functools.reduce(SaliencyStats.merge, others)
            # As many tokens as the whole: a root of n grows with the root of the tokens.
            grown = (PARTS / (PARTS - 1)) ** (1 - power)
            without.append(score(rest, criterion, weights)[name] * grown)
        scattered = torch.stack(without) - torch.stack(without).mean(dim=0)
        variance = scattered.square().sum(dim=0) * (PARTS - 1) / PARTS
        torch.testing.assert_close(one.error, variance.sqrt(), rtol=1e-9, atol=1e-12)
        assert one.error[NEVER] == 0


def test_a_count_varies_between_parts_of_unlike_size_by_its_rate() -> None:
    """Where every part has the same rate, unlike sizes alone make no error."""
    parts = []
    for size in (1, 2, 5, 9):
        layer = LayerStats(2)
        layer.tokens += 10 * size
        layer.count.copy_(torch.tensor([[30 * size, 10 * size]]))
        facts = {"num_experts": 2, "top_k": 1}
        parts.append(SaliencyStats({"a": layer}, ["x"], {"layers": {"a": facts}}))
    one = uncertainty(in_parts(parts), "frequency")["a"]
    assert one.scores.tolist() == [30 * 17, 10 * 17]
    assert one.error.abs().max() < 1e-9


def test_equal_parts_leave_no_doubt() -> None:
    part = model_stats({"a": Rows(1, 3)}, ["x"])
    stats = in_parts([part, part, part])
    assert uncertainty(stats)["a"].error.abs().max() < 1e-12
    plan = make_plan(score(stats), 0.5)
    kept = keep_probability(stats, plan)
    assert kept["a"].nonzero().flatten().tolist() == list(plan.layers["a"].kept)
    assert margin(kept) == {}


# (1 + level) / 2, degrees of freedom, quantile: from a printed table of Student's t.
STUDENT = [
    (0.95, 1, 6.314),
    (0.975, 1, 12.706),
    (0.95, 2, 2.920),
    (0.9, 3, 1.638),
    (0.995, 4, 4.604),
    (0.95, 7, 1.895),
    (0.975, 8, 2.306),
    (0.95, 30, 1.697),
]


@pytest.mark.parametrize(("probability", "degrees", "quantile"), STUDENT)
def test_intervals_use_students_t(probability: float, degrees: int, quantile: float) -> None:
    deviations = torch.zeros(degrees + 1, 2, dtype=torch.float64)
    deviations[0] = torch.tensor([1.0, 30.0])
    one = Uncertainty(torch.tensor([50.0, 50.0]).double(), deviations)
    low, high = one.interval(2 * probability - 1)
    assert high.tolist() == pytest.approx([50 + quantile, 50 + 30 * quantile], abs=0.02)
    assert low.tolist() == pytest.approx([50 - quantile, max(0, 50 - 30 * quantile)], abs=0.02)


def simulated(truth: Tensor, seed: int, parts: int = 8, rows: int = 60) -> SaliencyStats:
    """One layer whose experts have these true mean contributions, observed in parts.

    Every part routes about `rows` rows to each expert; products of gate and norm are exponential,
    as skewed as any.
    """
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(parts):
        layer = LayerStats(len(truth))
        count = torch.poisson(torch.full_like(truth, rows), generator=draw).long()
        owner = torch.arange(len(truth)).repeat_interleave(count)
        each = -torch.rand(len(owner), generator=draw, dtype=torch.float64).log() * truth[owner]
        layer.count.copy_(count[None])
        layer.weighted_norm_sum[0].index_add_(0, owner, each)
        layer.tokens += 10 * rows
        facts = {"num_experts": len(truth), "top_k": 2}
        provenance = {"model": MODEL, "layers": {"a": facts}}
        found.append(SaliencyStats({"a": layer}, ["x"], provenance))
    return in_parts(found)


def test_nine_of_ten_intervals_of_90_percent_hold_the_truth() -> None:
    """4800 intervals: their share has a standard error of 0.4 %."""
    held: dict[float, list[Tensor]] = {0.9: [], 0.5: []}
    counts = []
    for seed in range(24):
        truth = torch.rand(200, generator=torch.Generator().manual_seed(seed)).double() + 0.5
        stats = simulated(truth, 100 + seed)
        one = uncertainty(stats)["a"]
        for level, inside in held.items():
            low, high = one.interval(level)
            inside.append((low <= truth) & (truth <= high))
        low, high = uncertainty(stats, "frequency")["a"].interval(0.9)
        counts.append((low <= 8 * 60) & (high >= 8 * 60))
    for level, inside in held.items():
        assert torch.cat(inside).double().mean() == pytest.approx(level, abs=0.02)
    assert torch.cat(counts).double().mean() == pytest.approx(0.9, abs=0.02)


def test_experts_kept_with_probability_p_belong_to_the_better_half_p_of_the_time() -> None:
    chance, belongs = [], []
    for seed in range(40):
        truth = torch.rand(64, generator=torch.Generator().manual_seed(seed)).double() + 0.5
        stats = simulated(truth, 500 + seed)
        kept = keep_probability(stats, make_plan(score(stats), 0.5), seed=seed)["a"]
        assert float(kept.sum()) == pytest.approx(32, abs=1e-9)  # as many as the plan keeps
        chance.append(kept)
        belongs.append(truth >= truth.sort().values[32])
    p, truly = torch.cat(chance), torch.cat(belongs).double()
    for low, high in ((0.0, 0.025), (0.025, 0.35), (0.35, 0.65), (0.65, 0.975), (0.975, 1.01)):
        inside = (p >= low) & (p < high)
        assert int(inside.sum()) > 60
        assert truly[inside].mean() == pytest.approx(float(p[inside].mean()), abs=0.09), low


def test_probabilities_are_those_of_ranking_every_draw() -> None:
    """The shortcut that ranks only experts near the cut changes nothing."""
    stats = sampled(n_group=2, topk_group=2, top_k=2)
    plan = make_plan(score(stats), 0.4, protected={"b": [NEVER]})
    found = keep_probability(stats, plan, draws=60, seed=3)
    noise = normal(60, 2 * PARTS - 1, 3)
    for name, one in uncertainty(stats).items():
        protected = frozenset(plan.settings["protected"].get(name, ()))
        router = Router.of(name, stats.provenance["layers"][name])
        budget = router.losing(len(plan.layers[name].removed), protected)
        times = torch.zeros(EXPERTS)
        for row in noise:
            scale = row[PARTS:].square().mean().sqrt()
            drawn = one.scores + (row[:PARTS] / scale) @ one.deviations
            times[list(kept_experts(drawn, budget))] += 1
        torch.testing.assert_close(found[name], times.double() / 60)
    assert found["b"][NEVER] == 1


def test_draws_are_seeded_and_the_same_everywhere() -> None:
    stats = sampled()
    plan = plan_of_removals(score(stats), {"a": 3, "b": 1}, allocation="searched", ratio=0.3)
    first, again = (keep_probability(stats, plan, seed=5) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["a"], keep_probability(stats, plan, seed=6)["a"])
    assert {name: round(float(p.sum()), 9) for name, p in first.items()} == {"a": 3, "b": 5}
    written = [-0.4570076778009583, 1.6244993503056475]
    assert normal(1, 2, 7)[0].tolist() == pytest.approx(written, rel=1e-12)


def test_the_margin_is_strict() -> None:
    values = torch.tensor([0, 0.025, 0.03, 0.5, 0.975, 1], dtype=torch.float64)
    kept = {"a": values, "b": torch.ones(2)}
    assert margin(kept) == {"a": (2, 3)}
    assert margin(kept, 0.6) == {"a": (3,)}


def test_halves_are_the_even_and_the_odd_parts() -> None:
    stats = sampled(None)
    even, odd = halves(stats, "msan", {"x": 1, "y": 1})
    for scores, start in ((even, 0), (odd, 1)):
        merged = functools.reduce(SaliencyStats.merge, stats.parts[start::2])
        assert torch.equal(scores["b"], score(merged, "msan", {"x": 1, "y": 1})["b"])
    assert set(rank_correlation(even, odd)) == {"a", "b"}


def test_groups_scored_alone() -> None:
    stats = sampled(None)
    found = group_scores(stats, "ean_mean")
    assert list(found) == ["x", "y"]
    assert torch.equal(found["y"]["a"], score(stats, "ean_mean", {"x": 0, "y": 1})["a"])
    agreement = rank_correlation(found["x"], found["y"])
    assert all(-1 <= value < 1 for value in agreement.values())


def test_rank_correlation_is_spearmans() -> None:
    """Against ranks counted pair by pair, with many ties."""
    draw = random.Random(1)
    for _ in range(50):
        size = draw.randint(2, 12)
        x, y = ([draw.randint(0, 5) for _ in range(size)] for _ in range(2))
        ranks = [
            [sum(b < a for b in v) + (1 + sum(b == a for b in v)) / 2 for a in v] for v in (x, y)
        ]
        means = [sum(r) / size for r in ranks]
        centered = [[a - m for a in r] for r, m in zip(ranks, means, strict=True)]
        norms = [math.sqrt(sum(a * a for a in r)) for r in centered]
        tensors = [{"a": torch.tensor(v).double()} for v in (x, y)]
        [found] = rank_correlation(*tensors).values()
        if 0 in norms:
            assert math.isnan(found)
        else:
            product = sum(a * b for a, b in zip(*centered, strict=True))
            assert found == pytest.approx(product / norms[0] / norms[1], abs=1e-12)
    monotone = {"a": torch.arange(9).double()}, {"a": torch.arange(9).double().exp()}
    assert rank_correlation(*monotone)["a"] == pytest.approx(1)
    assert rank_correlation(monotone[0], {"a": -monotone[0]["a"]})["a"] == pytest.approx(-1)


def test_statistics_without_parts_are_refused() -> None:
    stats = sampled()
    for few in ([], stats.parts[:1]):
        lone = SaliencyStats(stats.layers, stats.groups, stats.provenance, few)
        for ask in (uncertainty, halves):
            with pytest.raises(DataError, match=rf"have {len(few)} parts.*observe with `folds=8`"):
                ask(lone)
    short = SaliencyStats(stats.layers, stats.groups, stats.provenance, stats.parts[:-1])
    with pytest.raises(DataError, match="layer a: the parts do not add up to the whole"):
        uncertainty(short)


def test_one_part_with_all_tokens_is_refused() -> None:
    rows = [Rows(2, seed, rows=60 if seed == 0 else 0) for seed in range(3)]
    for each in rows[1:]:
        each.tokens[1] = 0
    stats = in_parts([model_stats({"a": each}, ["x", "y"]) for each in rows])
    with pytest.raises(DataError, match=r"layer a: one part of the data holds all tokens of .*'y'"):
        uncertainty(stats, "reap", {"x": 1, "y": 1})
    for each in rows[1:]:
        each.tokens[:] = 0
    stats = in_parts([model_stats({"a": each}, ["x", "y"]) for each in rows])
    with pytest.raises(DataError, match="layer a: one part of the data holds all its tokens"):
        uncertainty(stats)


def test_parts_without_tokens_count_for_nothing() -> None:
    """More folds than sequences: the empty ones neither add certainty nor take it."""
    full = [model_stats({"a": Rows(1, seed)}, ["x"]) for seed in range(3)]
    empty = Rows(1, 9, rows=0)
    empty.tokens[:] = 0
    padded = in_parts([*full, model_stats({"a": empty}, ["x"])])
    torch.testing.assert_close(
        uncertainty(padded)["a"].deviations, uncertainty(in_parts(full))["a"].deviations
    )


@pytest.mark.parametrize("criterion", ["max_activation", "random:3"])
def test_what_is_no_sum_has_no_interval(criterion: str) -> None:
    with pytest.raises(PlanError, match=f"'{criterion}' is no function of sums"):
        uncertainty(sampled(), criterion)


def test_plans_and_scores_of_other_models_are_refused() -> None:
    stats = sampled()
    other = model_stats({"z": Rows(2, 0)}, ["x", "y"])
    with pytest.raises(PlanError, match="the plan has other layers"):
        keep_probability(stats, make_plan(score(other), 0.5))
    with pytest.raises(PlanError, match="scores are of different layers"):
        rank_correlation(score(stats), score(other))
