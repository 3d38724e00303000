"""Criteria against their formulas, written out over the rows themselves in float64."""

import math
from typing import Any

import pytest
import torch

from reap_driver.planning.criteria import CRITERIA, RECORDED, criterion_named
from reap_driver.planning.scoring import score
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import DataError, PlanError
from tests.driver.planning.statistics import EXPERTS, NEVER, Rows, model_stats

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
    "S(0.5, 1, 1)": (0.5, 1, 1),
    "S(1,0,0)": (1, 0, 0),
    "S(2, 2.0, 2)": (2, 2, 2),
    "S( .25 ,0,2 )": (0.25, 0, 2),
}
NAMES = [*FAMILY, "max_activation"]


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


@pytest.mark.parametrize("criterion", NAMES)
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


@pytest.mark.parametrize("criterion", NAMES)
def test_weights_give_what_that_mix_would_have_given(criterion: str) -> None:
    """Each group's rows count as often as its share of tokens asks for."""
    rows = Rows(3, 7)
    stats = model_stats({"a": rows}, ["code", "tools", "chat"])
    shares = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
    scores = score(stats, criterion, {"tools": 2, "code": 3, "chat": 0})
    factor = (shares * rows.tokens.sum() / rows.tokens)[rows.group]
    assert scores["a"].tolist() == pytest.approx(by_formula(rows, criterion, factor), rel=1e-12)


@pytest.mark.parametrize("criterion", NAMES)
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
    power = 0 if criterion == "max_activation" else 1 - FAMILY[criterion][0]
    grows = (rows.tokens.sum() / rows.tokens[0]) ** power
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
    stats.layers["a"].weighted_norm_sum[0, 0] *= 1 + 1e-15
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


def test_every_criterion_is_tested() -> None:
    assert set(CRITERIA) < set(NAMES)
    assert set(RECORDED) == {(alpha, p) for _, alpha, p in FAMILY.values()}


def test_the_generic_name_gives_the_bits_of_the_named_criterion() -> None:
    stats = model_stats({"a": Rows(2, 0)}, ["x", "y"])
    for name, (b, alpha, p) in FAMILY.items():
        if name in CRITERIA:
            generic = score(stats, f"S({b},{alpha},{p})", {"x": 1, "y": 2})
            assert torch.equal(generic["a"], score(stats, name, {"x": 1, "y": 2})["a"])


def test_random_scores_are_seeded_and_look_at_nothing() -> None:
    stats, others = (model_stats({"a": Rows(1, n), "b": Rows(1, 9)}, ["x"]) for n in (0, 1))
    for name in ("random", "random:0", "random:7"):
        assert torch.equal(score(stats, name)["a"], score(others, name)["a"])
    assert torch.equal(score(stats, "random")["b"], score(stats, "random:0")["b"])
    assert not torch.equal(score(stats, "random:7")["a"], score(stats, "random")["a"])
    assert not torch.equal(score(stats, "random")["a"], score(stats, "random")["b"])
    # The same on every machine: the values are written down.
    assert score(stats, "random:7")["a"][:2].tolist() == [0.32383276483316237, 0.15084917392450192]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("taylor", r"'taylor' is unknown.*reap, reap_l2, frequency.*S\(b,alpha,p\) or random:SEED"),
        ("S(1,1,3)", r"needs sum g\^1 \|\|f\|\|\^3, which is not recorded; .*\(0, 0\), \(1, 0\)"),
        ("S(1,0.5,1)", r"needs sum g\^0.5 \|\|f\|\|\^1, which is not recorded"),
        ("S(-1,1,1)", "is unknown"),
        ("S(1,1)", "is unknown"),
        ("S(1,1,1", "is unknown"),
        ("random:", "is unknown"),
        ("random:-1", "is unknown"),
        ("random:x", "is unknown"),
        ("", "is unknown"),
    ],
)
def test_unknown_criteria_are_told_what_there_is(name: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        score(model_stats({"a": Rows(1, 0)}, ["x"]), name)
    with pytest.raises(ValueError, match=says):
        criterion_named(name)


def test_a_layer_nobody_reached_is_not_ranked() -> None:
    stats = model_stats({"text": Rows(1, 0), "vision": Rows(1, 1, rows=0)}, ["x"])
    with pytest.raises(DataError, match=r"layer vision: no token.*calibrate with data"):
        score(stats)


@pytest.mark.parametrize("criterion", ["reap", "random", "max_activation", lambda layer: [1.0]])
def test_statistics_without_layers_are_not_scored(criterion: Any) -> None:
    with pytest.raises(DataError, match="no layer, so there is nothing to score"):
        score(SaliencyStats({}, ["x"]), criterion)


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
    stats.layers["a"].weighted_norm_sum[0, 1] = math.nan
    with pytest.raises(DataError, match=r"layer a: scores of experts \[1\]"):
        score(stats)


LACKING = ("norm_sq_sum", "weighted_norm_sq_sum", "out_min")


def lacking() -> SaliencyStats:
    """Statistics without squares and minima, as another tool records them."""
    whole = model_stats({"model.layers.0.mlp.experts": Rows(1, seed=0)}, ["code"])
    layers = {
        name: LayerStats(EXPERTS, missing=LACKING).merge_(layer)
        for name, layer in whole.layers.items()
    }
    return SaliencyStats(layers, whole.groups, whole.provenance)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_that_needs_what_is_not_recorded_is_refused(name: str) -> None:
    needed = [field for field in CRITERIA[name].fields if field in LACKING]
    if not needed:
        whole = model_stats({"model.layers.0.mlp.experts": Rows(1, seed=0)}, ["code"])
        for layer, values in score(whole, name).items():
            assert torch.equal(score(lacking(), name)[layer], values)
        return
    with pytest.raises(DataError, match=f"{name!r} needs {needed[0]}, not recorded .* use one of"):
        score(lacking(), name)


def test_a_function_cannot_read_what_is_not_recorded() -> None:
    with pytest.raises(DataError, match="norm_sq_sum is not recorded"):
        score(lacking(), lambda layer: layer.norm_sq_sum[0], name="mine")
