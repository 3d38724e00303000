"""Searches over shapes: which are tried, what they are judged by, and the plan of the best one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reap_driver as rd
from reap_driver.base.interrupts import Interrupted, Stop
from reap_driver.compensation.shaping import Shaping
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.memory.host_memory import Free
from reap_driver.plan_search import shape_task as module
from reap_driver.plan_search.fitness import Fitness
from reap_driver.plan_search.held_out import held_out
from reap_driver.plan_search.recorder import Recorder
from reap_driver.plan_search.search_state import SHAPE, SearchState, read
from reap_driver.plan_search.shape_search import MOST, FoundShape, search, tried
from reap_driver.plan_search.shape_task import ShapeTask
from reap_driver.planning.shape import Shape
from reap_kernels.errors import DataError, PlanError, ResourceError, ShapeError
from tests.driver import zoo
from tests.driver.plan_search.test_fitness import batches
from tests.driver.writer.test_router_mask import bits

WIDTH, MULTIPLE = 32, 4
TEXT, OTHER = batches((3, 24), (2, 9)), batches((4, 15))
RUN = {"model": "sha256:0"}


@pytest.fixture(scope="module")
def observed() -> Any:
    """A model, its statistics and Grams."""
    _, model = zoo.tiny("qwen3_moe", vocab_size=211, moe_intermediate_size=WIDTH)
    with rd.observe(model, gram=True) as obs:
        for inputs in batches((8, 40), (8, 41)):
            obs(**inputs)
    return model, obs.stats, obs.grams


def found_of(observed: Any, **options: Any) -> FoundShape:
    model, stats, grams = observed
    given = {"width_multiple": MULTIPLE, "validation": OTHER, **options}
    return rd.search_shape(model, stats, grams, TEXT, 0.5, **given)


def task_of(observed: Any, ratio: float = 0.5, multiple: int | None = MULTIPLE) -> ShapeTask:
    model, stats, grams = observed
    scores = rd.score(stats)
    whole, shaping = rd.make_plan(scores, ratio), Shaping(scores, stats)
    task = ShapeTask(RouterMasks(model), grams, shaping, whole, multiple=multiple)
    for name in observed[2]:
        task.measure(name)
    return task


def test_what_is_tried() -> None:
    assert list(tried(12, 5, lambda shape: -abs(shape - 7))) == [12, 5, 2, 9, 3, 7, 6, 8]
    assert list(tried(6, 2, lambda shape: -abs(shape - 2))) == [6, 2, 0, 4, 1, 3, 5]
    assert list(tried(1, 0, float)) == [1, 0]
    worse = {number: -number for number in range(40)}  # the best is the narrowest
    assert list(tried(39, 20, worse.__getitem__)) == [39, 20, 9, 30, 4, 15, 1, 7]


@pytest.mark.parametrize("number", range(1, 10))
def test_a_single_peak_is_found(number: int) -> None:
    """Where acceptance rises to one shape and falls behind it, that is found among nine."""
    for first in range(number):
        for peak in range(number + 1):
            calls: list[int] = []

            def fitness(shape: int, peak: int = peak, calls: list[int] = calls) -> float:
                calls.append(shape)
                return -abs(shape - peak) - (shape > peak) / 2

            values = tried(number, first, fitness)
            assert calls == list(values), "each once"
            assert len(values) - 1 == min(number, MOST)
            assert max(values, key=lambda shape: values[shape]) == peak


def test_each_is_judged_by_what_its_checkpoint_computes(observed: Any) -> None:
    model, stats, grams = observed
    before = bits(model)
    found = found_of(observed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    whole, *narrow = found.tried
    assert (str(whole.shape), found.uniform) == ("4x32", whole.acceptance)
    assert len(narrow) == 3, "all that there are"
    assert all(one.shape.width % MULTIPLE == 0 for one in narrow)
    fitness = Fitness(model, TEXT)
    for one in found.tried:
        layers, matrices = {}, {}
        for name, values in rd.score(stats).items():
            ids = values.argsort(descending=True)[: one.shape.experts].sort().values.tolist()
            down = model.get_submodule(name).down_proj.detach()
            cut = rd.prune_width(down, grams[name], one.shape.width, experts=ids)
            neurons = tuple(map(tuple, cut.neurons.tolist()))
            layers[name] = rd.LayerPlan.keeping(8, tuple(ids), WIDTH, neurons)
            matrices[name] = cut.down
        plan = rd.Plan({"id": "m"}, "reap", "uniform", 0.5, layers, "")
        value = fitness(lambda p=plan, m=matrices: rd.compensated(model, p, m))
        assert one.acceptance == pytest.approx(value, abs=1e-5)


def test_the_best_is_planned(observed: Any) -> None:
    model, *_ = observed
    found = found_of(observed)
    best = max(found.tried, key=lambda one: one.acceptance)
    plan = found.plan
    assert (plan.shape, found.fitness) == (str(best.shape), best.acceptance)
    assert plan.settings == {"shape": "auto", "width_multiple": MULTIPLE, "ridge": 1e-3}
    assert (plan.ratio, plan.uniform, plan.allocation) == (0.5, True, "uniform")
    fitness = Fitness(model, TEXT)
    value = fitness(lambda: rd.compensated(model, plan, found.matrices))
    assert value == pytest.approx(found.fitness, abs=1e-6)
    chosen, table, check = plan.notes[-3:]
    assert f"of {len(found.tried)} shapes {plan.shape} has the highest expected accept" in chosen
    assert chosen.endswith(f"the cut of whole experts (4x32) has {found.uniform:.4f}")
    for one in found.tried:
        assert f"{one.shape}: {one.expected_error:.4f}, {one.acceptance:.4f}" in table
    assert "on 4 held-out sequences" in check
    assert "of the cut of whole experts" in check
    again = found_of(observed)
    assert (again.plan, again.tried, again.check) == (plan, found.tried, found.check)


def test_held_out_text_compares_it_with_whole_experts(observed: Any) -> None:
    model, stats, _ = observed
    found = found_of(observed)
    whole = rd.make_plan(rd.score(stats), 0.5)
    both = (
        lambda: rd.masked_experts(model, whole.kept),
        lambda: rd.compensated(model, found.plan, found.matrices),
    )
    check = held_out(model, OTHER, *both)
    assert found.check is not None
    assert found.check.searched == pytest.approx(check.searched, abs=1e-6)
    assert found.check.uniform == check.uniform
    assert found.check.low < found.check.searched - found.check.uniform < found.check.high
    assert found_of(observed, validation=()).check is None


class Pretended:
    """A fitness by width alone, which can request the end of the search."""

    def __init__(self, of: Callable[[int], float], stop: Stop | None = None, after: int = 0):
        self.calls, self._of, self._stop, self._after = 0, of, stop, after

    def __call__(self, shape: tuple[int, ...]) -> float:
        self.calls += 1
        if self._stop is not None and self.calls == self._after:
            self._stop.requested = True
        return self._of(shape[1])


def test_where_whole_experts_win_they_are_planned(observed: Any) -> None:
    task = task_of(observed)
    found = search(task, Recorder(Pretended(float)))
    assert not found.plan.narrows
    assert (found.fitness, found.uniform, found.matrices) == (32, 32, None)
    assert found.plan.kept == rd.make_plan(rd.score(observed[1]), 0.5).kept
    assert ": the cut of whole experts, so no neurons are removed" in found.plan.notes[-2]


def test_the_one_expected_to_cost_least_comes_first(observed: Any) -> None:
    task = task_of(observed)
    expected = {shape: task.expected(shape) for shape in task.shapes}
    found = search(task, Recorder(Pretended(float)))
    assert found.tried[0].shape == task.whole == Shape(4, 32)
    assert found.tried[1].shape == min(expected, key=lambda shape: expected[shape])
    assert all(0 < one.expected_error < math.inf for one in found.tried)


@pytest.mark.parametrize("after", [1, 3])
def test_resumed_is_undisturbed(observed: Any, tmp_path: Path, after: int) -> None:
    def of(width: int) -> float:
        return 1 / (1 + abs(width - 20))

    task = task_of(observed)
    undisturbed = search(task, Recorder(Pretended(of)))
    state, stop = SearchState(tmp_path / "state", RUN, SHAPE), Stop()
    with pytest.raises(Interrupted, match=f"after {after} candidates; they are saved"):
        search(task, Recorder(Pretended(of, stop, after), state, stop))
    again = Pretended(of)
    found = search(task, Recorder(again, state, known=read(state.path).evaluated))
    assert found == undisturbed
    assert again.calls == len(undisturbed.tried) - after
    assert len(read(state.path).evaluated) == len(undisturbed.tried)


def test_what_is_refused(observed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stats, grams = observed
    name = list(grams)[-1]
    few = {key: value for key, value in grams.items() if key != name}
    with pytest.raises(DataError, match=f"no Gram matrices of layer {name}; observe all layers"):
        rd.search_shape(model, stats, few, TEXT, width_multiple=MULTIPLE)
    _, other = zoo.tiny("qwen3_moe", vocab_size=211, moe_intermediate_size=16)
    with rd.observe(other, gram=True) as obs:
        obs(**TEXT[0])
    with pytest.raises(ShapeError, match="give the Gram of this layer"):
        rd.search_shape(model, stats, obs.grams, TEXT, width_multiple=MULTIPLE)
    with pytest.raises(PlanError, match=r"made for .*: intermediate_size"):
        rd.search_shape(other, stats, grams, TEXT)
    with pytest.raises(PlanError, match=r"no shape but whole experts .* smaller `width_multiple`"):
        rd.search_shape(model, stats, grams, TEXT, width_multiple=32)
    monkeypatch.setattr(module, "free_device_memory", lambda _: Free(1000, "by a test"))
    with pytest.raises(ResourceError, match=r"trying a shape takes .* but 1.00 kB are free \(by a"):
        rd.search_shape(model, stats, grams, TEXT, width_multiple=MULTIPLE)


def test_memory_is_that_of_the_largest_shape(observed: Any) -> None:
    task = task_of(observed)
    layers, hidden = 2, observed[0].config.hidden_size
    most = max(shape.experts * (shape.width + WIDTH) for shape in task.shapes)
    assert task.nbytes == layers * most * hidden * 4
