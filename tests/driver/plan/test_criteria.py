"""Criteria against their formulas, written out over the rows themselves in float64."""

import math

import pytest
import torch

from reap_driver.criteria import CRITERIA, score
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, PlanError
from tests.driver.plan.statistics import EXPERTS, NEVER, Rows, model_stats

# S(b, alpha, p) of each criterion, from the papers, not from the code.
FAMILY = {
    "frequency": (0, 0, 0),
    "weighted_frequency": (0, 1, 0),
    "ean_sum": (0, 0, 1),
    "ean_mean": (1, 0, 1),
    "weighted_ean": (0, 1, 1),
    "reap": (1, 1, 1),
    "msan": (1, 0, 2),
    "reap_l2": (1, 2, 2),
}


def by_formula(rows: Rows, criterion: str, factor: torch.Tensor | None = None) -> list[float]:
    """Scores straight from the definition; `factor` [S] weighs the rows."""
    scores = []
    factor = torch.ones_like(rows.gate) if factor is None else factor
    for expert in range(EXPERTS):
        mine = rows.of(expert) & (factor > 0)
        if not mine.any():
            scores.append(0.0)
        elif criterion == "max_activation":
            scores.append(float(torch.maximum(rows.high[mine].abs(), rows.low[mine].abs()).max()))
        else:
            b, alpha, p = FAMILY[criterion]
            total = (factor * rows.gate**alpha * rows.norm**p)[mine].sum()
            scores.append(float(total / factor[mine].sum() ** b))
    return scores


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("groups", [1, 3])
def test_scores_are_the_formula(criterion: str, groups: int) -> None:
    for seed in range(5):
        rows = {"a": Rows(groups, seed), "b": Rows(groups, 100 + seed)}
        scores = score(model_stats(rows, [f"g{i}" for i in range(groups)]), criterion)
        assert list(scores) == ["a", "b"]
        for name, values in scores.items():
            assert values.dtype == torch.float64
            assert values.tolist() == pytest.approx(by_formula(rows[name], criterion), rel=1e-12)
            assert values[NEVER] == 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_weights_give_what_that_mix_would_have_given(criterion: str) -> None:
    """Each group's rows count as often as its share of tokens asks for."""
    rows = Rows(3, 7)
    stats = model_stats({"a": rows}, ["code", "tools", "chat"])
    shares = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
    scores = score(stats, criterion, {"tools": 2, "code": 3, "chat": 0})
    factor = (shares * rows.tokens.sum() / rows.tokens)[rows.group]
    assert scores["a"].tolist() == pytest.approx(by_formula(rows, criterion, factor), rel=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_weights_laws(criterion: str) -> None:
    rows = Rows(2, 3)
    stats = model_stats({"a": rows}, ["x", "y"])
    observed = score(stats, criterion)["a"]
    as_observed = {"x": float(rows.tokens[0]), "y": float(rows.tokens[1])}
    torch.testing.assert_close(score(stats, criterion, as_observed)["a"], observed)
    tripled = {group: 3 * weight for group, weight in as_observed.items()}
    torch.testing.assert_close(score(stats, criterion, tripled)["a"], observed)

    alone = model_stats({"a": rows}, ["x", "y"])
    for packed in (alone.layers["a"].counts, alone.layers["a"].sums):
        packed[:, 1] = 0
    alone.layers["a"].extrema[0, 1], alone.layers["a"].extrema[1, 1] = -math.inf, math.inf
    alone.layers["a"].tokens[1] = 0
    weighed = score(stats, criterion, {"x": 1, "y": 0})["a"]
    # A sum grows to the tokens of all groups, a mean and a maximum stay.
    grows = rows.tokens.sum() / rows.tokens[0] if not CRITERIA[criterion].mean else 1.0
    grows = 1.0 if criterion == "max_activation" else grows
    torch.testing.assert_close(weighed, score(alone, criterion)["a"] * grows)


def test_merged_statistics_score_as_observed_together() -> None:
    first, second = Rows(1, 1), Rows(1, 2)
    merged = model_stats({"a": first}, ["x"]).merge(model_stats({"a": second}, ["x"]))
    both = Rows(1, 1)
    for name in ("group", "expert", "gate", "norm", "high", "low"):
        setattr(both, name, torch.cat([getattr(first, name), getattr(second, name)]))
    for criterion in CRITERIA:
        values = score(merged, criterion)["a"].tolist()
        assert values == pytest.approx(by_formula(both, criterion), rel=1e-12)


def test_scores_carry_where_they_came_from() -> None:
    stats = model_stats({"a": Rows(2, 0)}, ["x", "y"])
    stats.provenance["data"] = [{"group": "x", "tokens": 3}]
    scores = score(stats, "msan", {"x": 1, "y": 2})
    assert (scores.criterion, scores.weights) == ("msan", {"x": 1, "y": 2})
    assert scores.model == stats.provenance["model"]
    assert scores.layers["a"]["top_k"] == 2
    assert scores.data == [{"group": "x", "tokens": 3}]


def test_the_digest_tells_scores_apart() -> None:
    stats = model_stats({"a": Rows(1, 0)}, ["x"])
    digests = {score(stats, criterion).digest() for criterion in CRITERIA}
    digests.add(score(stats, "reap", {"x": 1}).digest())
    stats.layers["a"].gate_norm_sum[0, 0] *= 1 + 1e-15
    digests.add(score(stats, "reap").digest())
    assert len(digests) == len(CRITERIA) + 2
    assert score(stats).digest() == score(stats).digest()


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"x": 1}, r"\['x'\].*\['x', 'y'\]"),
        ({"x": 1, "y": 1, "z": 1}, r"\['x', 'y', 'z'\]"),
        ({"x": -1, "y": 2}, "not negative"),
        ({"x": 0, "y": 0}, "not all 0"),
        ({"x": math.nan, "y": 1}, "finite"),
        ({"x": math.inf, "y": 1}, "finite"),
    ],
)
def test_wrong_weights_are_refused(weights: dict[str, float], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        score(model_stats({"a": Rows(2, 0)}, ["x", "y"]), "reap", weights)


def test_unknown_criterion_names_the_known() -> None:
    with pytest.raises(PlanError, match=r"'taylor'.*reap, reap_l2, frequency"):
        score(model_stats({"a": Rows(1, 0)}, ["x"]), "taylor")


def test_a_layer_nobody_reached_is_not_ranked() -> None:
    stats = model_stats({"text": Rows(1, 0), "vision": Rows(1, 1, rows=0)}, ["x"])
    with pytest.raises(DataError, match=r"layer vision: no token.*calibrate with data"):
        score(stats)


def test_a_weighted_group_needs_tokens() -> None:
    rows = Rows(2, 0)
    rows.tokens[1] = 0
    with pytest.raises(DataError, match=r"layer a: a group.*'y': 0"):
        score(model_stats({"a": rows}, ["x", "y"]), "reap", {"x": 1, "y": 1})


def test_what_is_not_finite_is_never_averaged_in() -> None:
    stats: SaliencyStats = model_stats({"a": Rows(1, 0)}, ["x"])
    stats.layers["a"].nonfinite[0, 2] = 5
    with pytest.raises(DataError, match=r"layer a, group 'x': 5 expert outputs"):
        score(stats)
    stats = model_stats({"a": Rows(1, 0)}, ["x"])
    stats.layers["a"].gate_norm_sum[0, 1] = math.nan
    with pytest.raises(DataError, match=r"layer a: scores of experts \[1\]"):
        score(stats)
