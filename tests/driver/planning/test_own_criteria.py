"""Criteria brought from elsewhere: functions of statistics, plain scores, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.reporting.inputs import Inputs
from reap_kernels import LayerStats
from reap_kernels.errors import DataError, PlanError
from tests.driver.planning.statistics import EXPERTS, MODEL, Rows, model_stats
from tests.driver.writer import saved

LAYERS = ["model.layers.1.mlp.experts", "model.layers.4.mlp.experts"]
NAME = "my criterion: S(2) <b>|%"
PLAIN = {LAYERS[0]: [3, 1, 2, 6, 5, 4], LAYERS[1]: np.arange(EXPERTS) - 2.5}


def stats(groups: int = 2) -> rd.SaliencyStats:
    names = ["x", "y"][:groups]
    return model_stats({name: Rows(groups, seed) for seed, name in enumerate(LAYERS)}, names)


def work(layer: LayerStats) -> Tensor:
    """Sum of all outputs' norms."""
    return layer.total().norm_sum[0]


def test_a_function_scores_as_the_formula_it_computes() -> None:
    known = stats()
    own, built_in = rd.score(known, work), rd.score(known, "ean_sum")
    assert own.criterion == "work"
    assert rd.score(known, work, name=NAME).criterion == NAME
    assert rd.score(known, lambda layer: work(layer).tolist()).criterion == "lambda"
    for name in LAYERS:
        assert torch.equal(own[name], built_in[name])
    plan = rd.make_plan(own, 0.5)
    assert plan.kept == rd.make_plan(built_in, 0.5).kept
    assert (plan.criterion, plan.weights) == ("work", None)
    assert own.digest() != built_in.digest()


def test_a_function_sees_every_group() -> None:
    known = stats()
    chosen = rd.score(known, lambda layer: layer.count[1], name="count of y")
    for name in LAYERS:
        assert chosen[name].tolist() == known.layers[name].count[1].tolist()


def test_plain_scores_of_statistics_or_a_model() -> None:
    plan = rd.make_plan(PLAIN, 0.5, criterion=NAME, of=stats())
    assert plan.kept == {LAYERS[0]: (3, 4, 5), LAYERS[1]: (3, 4, 5)}
    assert plan.criterion == NAME
    assert plan.model["config_digest"] == MODEL["config_digest"]
    assert rd.make_plan(PLAIN, 0.5, criterion=NAME, of=stats().provenance) == plan


def test_other_functions_take_them_too() -> None:
    known = stats()
    with pytest.raises(PlanError, match=r"normalize 'mean' would divide .* by 0"):
        rd.make_plan(PLAIN, 0.5, criterion="mine", of=known, allocation="global")
    plan = rd.make_plan(
        PLAIN, 0.5, criterion="mine", of=known, allocation="global", normalize="none"
    )
    assert sum(len(layer.removed) for layer in plan.layers.values()) == 6


def bad(layer: str, values: Any) -> dict[str, Any]:
    return {**PLAIN, layer: values}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too few": (bad(LAYERS[1], [1, 2, 3]), rf"{LAYERS[1]} scores of shape \[3\]; expected \[6\]"),
    "a matrix": (bad(LAYERS[1], torch.ones(6, 1)), r"shape \[6, 1\]"),
    "one number": (bad(LAYERS[0], torch.tensor(3.0)), r"shape \[\]"),
    "NaN": (bad(LAYERS[0], [1, 2, torch.nan, 4, 5, 6]), "expert 2 .* the score nan"),
    "infinite": (bad(LAYERS[0], [1, 2, 3, 4, 5, -torch.inf]), "expert 5 .* the score -inf"),
    "all equal": (bad(LAYERS[1], [2.5] * 6), "all 6 experts of layer .*4.* the score 2.5, so"),
    "texts": (bad(LAYERS[0], ["a"] * 6), "which are no numbers"),
    "a layer too many": (bad("model.layers.9.mlp.experts", [1] * 6), "names the layer 'model"),
    "a layer too few": ({LAYERS[0]: PLAIN[LAYERS[0]]}, "scores no layer 'model.layers.4"),
    "no layers": ({}, "scores no layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_scores_that_rank_nothing_are_refused_by_name(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(PlanError, match=message) as caught:
        rd.make_plan(values, 0.5, criterion="mine", of=stats())
    assert "'mine'" in str(caught.value)
    if case.startswith("a layer") or case == "no layers":
        return
    with pytest.raises(PlanError, match=message):
        rd.make_plan(rd.score(stats(), _each(values), name="mine"), 0.5)


def _each(values: dict[str, Any]) -> Any:
    """A function that returns these, layer by layer."""
    ordered = iter(values.values())
    return lambda _: next(ordered)


@pytest.mark.parametrize(
    "name", ["reap", "random:3", "random", "S(1,1,1)", "S(9, 9, 9)", "", "two\nlines", "x" * 101]
)
def test_names_that_mean_something_else_are_refused(name: Any) -> None:
    with pytest.raises(PlanError, match=r"criterion .*name"):
        rd.score(stats(), work, name=name)
    with pytest.raises(PlanError, match=r"criterion .*name"):
        rd.make_plan(PLAIN, 0.5, criterion=name, of=stats())


def test_plain_scores_need_a_name_and_a_model() -> None:
    for given in ({}, {"criterion": "mine"}, {"of": stats()}):
        with pytest.raises(PlanError, match="need a name and the model they are of"):
            rd.make_plan(PLAIN, 0.5, **given)
    with pytest.raises(PlanError, match="holds no `layers`"):
        rd.make_plan(PLAIN, 0.5, criterion="mine", of={})
    with pytest.raises(PlanError, match="these are by 'reap'"):
        rd.make_plan(rd.score(stats()), 0.5, criterion="mine")
    with pytest.raises(PlanError, match="no effect on a criterion of your own"):
        rd.score(stats(), work, {"x": 1, "y": 1})
    with pytest.raises(PlanError, match="for a function"):
        rd.score(stats(), "reap", name="mine")


def test_built_in_scores_that_decide_nothing_are_refused() -> None:
    known = stats()
    for layer in known.layers.values():
        layer.weighted_norm_sum.fill_(1)
        layer.count.fill_(2)
    with pytest.raises(PlanError, match=r"criterion 'reap' gives all 6 experts .* score 0\.5"):
        rd.make_plan(rd.score(known), 0.5)
    kept = rd.make_plan(rd.score(known, "ean_sum"), 0.5, layer_ratios={LAYERS[1]: 0})
    assert kept.layers[LAYERS[1]].removed == ()


@pytest.mark.parametrize("criterion", ["S(9999,1,1)", "S(400,0,1)"])
def test_powers_that_leave_float64_are_refused(criterion: str) -> None:
    with pytest.raises(DataError, match=r"n\^-\d+ sum .* too small for float64"):
        rd.score(stats(), criterion)


def test_the_card_the_report_and_the_record_name_it_verbatim(tmp_path: Path) -> None:
    model = saved.save("qwen3_moe", tmp_path / "model")
    record = rd.record_of(model)
    scores = {name: torch.randn(8) for name in record["layers"]}
    plan = rd.make_plan(scores, 0.25, criterion="my criterion, v2", of=record)
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["criterion"] == "my criterion, v2"
    rd.apply_plan(tmp_path / "model", rd.Plan.load(tmp_path / "plan.json"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| criterion | `my criterion, v2` |" in card
    assert "reap-kernels does not know it" in card
    with rd.observe(model) as obs:
        obs(input_ids=torch.arange(3, 43)[None])
    shown = Inputs.checked(obs.stats, plan, None)
    assert "The plan was made by my criterion, v2; the scores shown are by reap." in shown.notes()
    assert shown.doubt is not None
