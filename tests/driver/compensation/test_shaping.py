"""Plans of one shape: which experts and neurons stay, their matrices, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import reap_driver as rd
from reap_driver.compensation.shapes import expected_error
from reap_driver.compensation.shaping import Shaping
from reap_driver.compensation.width import width_order
from reap_driver.planning.shape import Shape
from reap_kernels import SaliencyStats
from reap_kernels.errors import PlanError
from tests.driver import zoo

EXPERTS, WIDTH, LEAST = 8, 32, 8
SETTINGS = {"shape": "auto"}


@pytest.fixture(scope="module")
def observed() -> Any:
    """A model's layers, its statistics and Grams."""
    config, model = zoo.tiny("qwen3_moe", moe_intermediate_size=WIDTH)
    with rd.observe(model, gram=True) as obs:
        for seed in range(4):
            obs(**zoo.tiny_inputs("qwen3_moe", config, batch=4, seq=32, seed=seed))
    down = {la.name: la.module.down_proj.detach() for la in rd.find_moe_layers(model)}
    return obs.stats, down, obs.grams


def shaping_of(observed: Any, **options: Any) -> Shaping:
    stats, down, grams = observed
    found = Shaping(rd.score(stats), stats, **options)
    for name in found.names:
        found.measure(name, down[name], grams[name], LEAST)
    return found


@pytest.mark.parametrize("shape", [Shape(6, 24), Shape(8, 16), Shape(4, 8)])
def test_it_is_each_layer_cut_by_itself(observed: Any, shape: Shape, tmp_path: Path) -> None:
    stats, down, grams = observed
    shaping = shaping_of(observed)
    plan = shaping.plan(shape, 0.4, SETTINGS)
    assert (plan.shape, plan.ratio, plan.settings) == (str(shape), 0.4, SETTINGS)
    assert (plan.allocation, plan.criterion) == ("uniform", "reap")
    plan.save(tmp_path / "plan.json")
    assert rd.Plan.load(tmp_path / "plan.json") == plan
    assert list(plan.layers) == list(down) == shaping.names
    for name, layer in plan.layers.items():
        best = rd.score(stats)[name].argsort(descending=True)[: shape.experts]
        assert layer.kept == tuple(sorted(best.tolist()))
        cut = rd.prune_width(down[name], grams[name], shape.width, experts=layer.kept)
        assert torch.tensor(layer.neurons).equal(cut.neurons)
        new = shaping.matrices(plan, name, list(down[name]), grams[name])
        torch.testing.assert_close(new, cut.down, rtol=1e-4, atol=1e-6)
        blank = shaping.blank(shape, 0.4)
        assert blank.kept == plan.kept
        assert torch.equal(shaping.matrices(blank, name, list(down[name]), grams[name]), new)


def test_whole_experts_are_a_plan_as_ever(observed: Any) -> None:
    shaping = shaping_of(observed)
    plan = shaping.plan(Shape(4, WIDTH), 0.5, SETTINGS)
    assert not plan.narrows
    assert shaping.blank(Shape(4, WIDTH), 0.5).layers == plan.layers
    assert plan.kept == rd.make_plan(rd.score(observed[0]), 0.5).kept


def test_expected_errors_are_means_over_layers(observed: Any) -> None:
    stats, down, grams = observed
    shaping = shaping_of(observed)
    shape = Shape(6, 24)
    errors = [
        expected_error(stats.layers[name], width_order(down[name], grams[name]), kept, 24, 3)
        for name, kept in shaping.plan(shape, 0.4, {}).kept.items()
    ]
    assert shaping.expected(shape) == pytest.approx(sum(errors) / len(errors), rel=1e-6)
    assert shaping.expected(Shape(8, WIDTH)) == 0


def test_protected_experts_stay(observed: Any) -> None:
    name = next(iter(observed[1]))
    free = shaping_of(observed)
    held = shaping_of(observed, protected={name: range(5)})
    assert [str(shape) for shape in free.shapes(0.5, multiple=8)] == ["8x16", "5x24", "4x32"]
    assert [str(shape) for shape in held.shapes(0.5, multiple=8)] == ["8x16", "5x24"]
    plan = held.plan(Shape(5, 24), 0.5, {})
    assert plan.kept[name] == (0, 1, 2, 3, 4)
    assert plan.settings == {"protected": {name: [0, 1, 2, 3, 4]}}
    most = shaping_of(observed, protected={name: range(8)})
    with pytest.raises(PlanError, match=r"no shape keeps the protected experts, .* has 8"):
        most.shapes(0.6, multiple=24)


def test_few_rows_are_said(observed: Any) -> None:
    stats, down, grams = observed
    first = next(iter(grams))
    poor = {name: gram.to("cpu") for name, gram in grams.items()}
    poor[first].count[:3] = torch.tensor([5, 6, 0])
    shaping = shaping_of((stats, down, poor))
    few, none = shaping.plan(Shape(6, 24), 0.4, {}).notes[-2:]
    assert few.startswith("2 experts have fewer than 64 rows")
    assert none.startswith("1 experts have no rows")
    assert first in few
    assert first in none


def changed(stats: SaliencyStats, name: str, **facts: Any) -> SaliencyStats:
    layers = {**stats.provenance["layers"]}
    layers[name] = {key: v for key, v in {**layers[name], **facts}.items() if v is not None}
    return dataclasses.replace(stats, provenance={**stats.provenance, "layers": layers})


def test_layers_that_differ_are_refused(observed: Any) -> None:
    stats, *_ = observed
    last = list(stats.layers)[-1]
    other = changed(stats, last, intermediate_size=48)
    with pytest.raises(PlanError, match=rf"and {last} differ in experts, .* without `shape`"):
        Shaping(rd.score(other), other)
    silent = changed(stats, last, intermediate_size=None)
    with pytest.raises(PlanError, match=rf"layer {last}: the statistics do not record the width"):
        Shaping(rd.score(silent), silent)


def test_layers_that_no_token_reached_are_refused(observed: Any) -> None:
    stats, *_ = observed
    scores = rd.score(stats)
    scores.unobserved.append("vision.3")
    with pytest.raises(PlanError, match=r"layer vision.3 \(1 in all\) was reached by no token"):
        Shaping(scores, stats)
