"""Searches from scores to a plan; an interrupted search resumes to the same bits."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import reap_driver as rd
from reap_driver.base.interrupts import Interrupted, Stop
from reap_driver.plan_search.budget_search import Task, search
from reap_driver.plan_search.evolution import Settings
from reap_driver.plan_search.fitness import Fitness
from reap_driver.plan_search.held_out import HeldOut, held_out
from reap_driver.plan_search.recorder import Recorder
from reap_driver.plan_search.search_state import FORMAT, SHAPE, Saved, SearchState, read
from reap_kernels.errors import DataError, PlanError
from tests.driver import zoo
from tests.driver.plan_search.test_fitness import batches, brute_force, masked
from tests.sealed import change_document

LAYERS = 4
SETTINGS = Settings(evaluations=40, population=10, elites=3, seed=2)
RUN = {"model": "sha256:0", "seed": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    _, model = zoo.tiny("qwen3_moe", vocab_size=211, num_hidden_layers=LAYERS)
    return model


@pytest.fixture(scope="module")
def scores(model: Any) -> rd.Scores:
    with rd.observe(model) as obs:
        for inputs in batches((4, 30)):
            obs(**inputs)
    return rd.score(obs.stats)


def task_of(scores: rd.Scores, ratio: float = 0.25) -> Task:
    return Task(scores, rd.make_plan(scores, ratio))


def removed(plan: rd.Plan) -> list[int]:
    return [len(layer.removed) for layer in plan.layers.values()]


def test_a_plan_is_found(model: Any, scores: rd.Scores) -> None:
    text, other = batches((2, 20), (3, 12))
    uniform = rd.make_plan(scores, 0.25)
    plan = rd.search_plan(model, scores, [text], 0.25, validation=[other], settings=SETTINGS)
    assert (plan.allocation, plan.ratio, plan.criterion) == ("searched", 0.25, "reap")
    assert plan.scores_digest == uniform.scores_digest
    assert sum(removed(plan)) == sum(removed(uniform)) == 2 * LAYERS
    assert len(set(removed(plan))) > 1
    fitness = Fitness(model, [text])
    searched, plain = (fitness(masked(model, one.kept)) for one in (plan, uniform))
    assert searched > plain
    [said] = [note for note in plan.notes if "the fittest of" in note]
    assert f"the fittest of 40 budgets: expected acceptance {searched:.4f}" in said
    assert said.endswith(f"where the uniform plan has {plain:.4f}")
    assert any("on 3 held-out sequences" in note for note in plan.notes)
    assert (
        rd.search_plan(model, scores, [text], 0.25, validation=[other], settings=SETTINGS) == plan
    )


def test_scores_of_another_model_are_refused(model: Any, scores: rd.Scores) -> None:
    _, other = zoo.tiny("qwen3_moe", moe_intermediate_size=20, num_hidden_layers=LAYERS)
    with pytest.raises(PlanError, match=r"made for .* Qwen3MoeForCausalLM: intermediate_size is"):
        rd.search_plan(other, scores, batches((2, 20)), settings=SETTINGS)


def test_within_a_layer_the_lowest_scores_go(model: Any, scores: rd.Scores) -> None:
    plan = rd.search_plan(model, scores, batches((2, 20)), 0.5, settings=SETTINGS)
    for name, layer in plan.layers.items():
        gone, stays = scores[name][list(layer.removed)], scores[name][list(layer.kept)]
        assert not len(gone) or gone.max() <= stays.min()
        assert len(layer.kept) >= 3  # what the router chooses


def test_protected_experts_stay_and_fixed_layers_lose_what_they_are_told(scores: rd.Scores) -> None:
    first, second = list(scores)[:2]
    worst = [int(expert) for expert in scores[first].argsort()[:6]]
    task = Task(
        scores, rd.make_plan(scores, 0.25, protected={first: worst}, layer_ratios={second: 0.5})
    )
    assert task.space.most[:2] == (2, 4)
    assert task.space.least[1] == 4
    draw, removals = Random(0), task.space.uniform
    for _ in range(50):
        removals = task.space.mutated(removals, draw)
        plan = task.plan(removals)
        assert set(worst) <= set(plan.layers[first].kept)
        assert removed(plan) == list(removals)
        assert len(plan.layers[second].removed) == 4
    assert plan.settings == {"protected": {first: sorted(worst)}, "layer_ratios": {second: 0.5}}


def test_routing_groups_stay_equal_in_size() -> None:
    _, model = zoo.tiny("deepseek_v3", n_routed_experts=16, n_group=4, topk_group=2)
    facts = {layer.name: layer.provenance() for layer in rd.find_moe_layers(model)}
    draw = torch.Generator().manual_seed(0)
    values = {name: torch.rand(16, generator=draw, dtype=torch.float64) for name in facts}
    scores = rd.Scores(values, criterion="reap", provenance={"layers": facts, "model": {"id": "m"}})
    task = task_of(scores)
    assert task.space.step == 4
    plan = task.plan(task.space.mutated(task.space.uniform, Random(1)))
    assert sorted(removed(plan)) == [0, 8]
    for layer in plan.layers.values():
        assert len({sum(e // 4 == group for e in layer.kept) for group in range(4)}) == 1


def test_a_ratio_that_leaves_nothing_to_search(scores: rd.Scores) -> None:
    with pytest.raises(PlanError, match="no budget but the uniform one removes 20 experts from 4"):
        task_of(scores, 0.625)  # every layer at what its router needs


class Pretended:
    """A fitness without a model, which counts calls and can request the end of the search."""

    def __init__(self, stop: Stop | None = None, after: int = 0) -> None:
        self.calls = 0
        self._stop, self._after = stop, after

    def __call__(self, removals: tuple[int, ...]) -> float:
        self.calls += 1
        if self._stop is not None and self.calls == self._after:
            self._stop.requested = True
        return sum((8 - count) * (i + 1) for i, count in enumerate(removals)) / 1.7e3


@pytest.mark.parametrize("after", [1, 10, 17, 39])
def test_resumed_is_undisturbed(scores: rd.Scores, tmp_path: Path, after: int) -> None:
    """Interrupted within a generation or between two, it resumes to the same plan and file."""
    task = task_of(scores)
    whole = SearchState(tmp_path / "whole", RUN)
    undisturbed = search(task, Recorder(Pretended(), whole), SETTINGS)

    state, stop = SearchState(tmp_path / "state", RUN), Stop()
    with pytest.raises(
        Interrupted, match=rf"after {after} candidates; they are saved in .*`resume=True`"
    ):
        search(task, Recorder(Pretended(stop, after), state, stop), SETTINGS)
    saved = state.resume()
    assert len(saved.evaluated) == after
    again = Pretended()
    recorder = Recorder(again, state, known=saved.evaluated, seconds=saved.seconds)
    found = search(task, recorder, SETTINGS)
    assert recorder.clock() >= saved.seconds
    assert again.calls == len(undisturbed.evaluated) - after
    assert list(found.evaluated.items()) == list(undisturbed.evaluated.items())
    assert found == undisturbed
    assert list(read(state.path).evaluated.items()) == list(read(whole.path).evaluated.items())


@pytest.mark.parametrize("after", [3, 10, 25])
def test_a_killed_search_loses_a_generation_at_most(
    scores: rd.Scores, tmp_path: Path, after: int
) -> None:
    class Killed(BaseException):
        pass

    class Dying(Pretended):
        def __call__(self, removals: tuple[int, ...]) -> float:
            if self.calls == after:
                raise Killed
            return super().__call__(removals)

    task, state = task_of(scores), SearchState(tmp_path / "state", RUN)
    undisturbed = search(task, Recorder(Pretended()), SETTINGS)
    with pytest.raises(Killed):
        search(task, Recorder(Dying(), state), SETTINGS)
    known = read(state.path).evaluated if state.path.exists() else {}
    assert len(known) == {3: 0, 10: 10, 25: 24}[after]  # generations of 10, then 7
    assert search(task, Recorder(Pretended(), state, known=known), SETTINGS) == undisturbed


def test_a_finished_search_can_be_made_longer(scores: rd.Scores, tmp_path: Path) -> None:
    task, state = task_of(scores), SearchState(tmp_path / "state", RUN)
    search(task, Recorder(Pretended(), state), SETTINGS)
    longer = dataclasses.replace(SETTINGS, evaluations=60)
    more = Pretended()
    found = search(task, Recorder(more, state, known=read(state.path).evaluated), longer)
    assert more.calls == 20
    assert found == search(task, Recorder(Pretended()), longer)


def test_interrupted_without_a_file(scores: rd.Scores) -> None:
    stop = Stop()
    with pytest.raises(Interrupted, match=r"^interrupted after 5 candidates$"):
        search(task_of(scores), Recorder(Pretended(stop, 5), stop=stop), SETTINGS)


def test_states_are_exact(tmp_path: Path) -> None:
    state = SearchState(tmp_path / "state", RUN)
    evaluated = {(1, 2): 0.1 + 0.2, (2, 1): 1 / 3, (0, 3): 5e-324}
    state.write(evaluated, 1.5)
    assert read(state.path) == Saved(RUN, evaluated, 1.5)
    assert list(read(state.path).evaluated) == list(evaluated)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    state.remove()
    assert not list(tmp_path.iterdir())


def test_states_of_shapes_are_exact(tmp_path: Path) -> None:
    state = SearchState(tmp_path / "state", RUN, SHAPE)
    evaluated = {(16, 48): 0.75, (24, 32): 1 / 3}
    state.write(evaluated, 1.5)
    assert read(state.path) == Saved(RUN, evaluated, 1.5)
    assert '"shape": [16, 48]' in state.path.read_text()


def _damaged(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def _version(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))


def _seconds(path: Path) -> None:
    path.write_text(path.read_text().replace('"seconds": 0', '"seconds": 1'))


def _changed(**change: Any) -> Callable[[Path], None]:
    return lambda path: change_document(path, FORMAT, change)


def _rows(*rows: Any) -> Callable[[Path], None]:
    return _changed(evaluated=[{"fitness": fitness, "removed": ids} for fitness, ids in rows])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            Path.unlink,
            "no state of a search, so nothing to resume; run without `resume=True`, or with "
            "`resume='auto'`",
        ),
        (_damaged, r"state of a search .* is not JSON .*; delete it and run without `resume=True`"),
        (_version, "has version 9, this reap-kernels reads 2"),
        (_seconds, "is damaged"),
        (_changed(evaluated=[["x", 1]]), r"field 'evaluated\[0\]' is \['x', 1\]"),
        (_rows(("x", [1, 2])), r"field 'evaluated\[0\].fitness' is 'x'"),
        (_rows((-0.5, [1, 2])), r"field 'evaluated\[0\].fitness' is -0.5"),
        (_rows((0.5, [1, -2])), r"field 'evaluated\[0\].removed\[1\]' is -2"),
        (_rows((0.5, [1, 2.5])), r"field 'evaluated\[0\].removed\[1\]' is 2.5"),
        (_rows((0.5, [1, 2]), (0.5, [1])), "different numbers of layers"),
        (_rows((0.5, [1, 2]), (0.4, [1, 2])), "or the same one twice"),
        (_changed(evaluated=[{"fitness": 0.5}]), "named by one of removed, shape"),
        (
            _changed(
                evaluated=[{"fitness": 0.5, "removed": [1]}, {"fitness": 0.4, "shape": [8, 16]}]
            ),
            "named by one of removed, shape",
        ),
        (
            _changed(evaluated=[{"fitness": 0.5, "removed": [1], "shape": [8, 16]}]),
            "named by one of removed, shape",
        ),
        (_changed(seconds=-1), "field 'seconds' is -1"),
        (_changed(run=[]), r"field 'run' is \[\]"),
        (_changed(run={"batch sizes": [0]}), r"field 'run.batch sizes\[0\]' is 0"),
        (_changed(more=1), "field 'more' is unknown"),
    ],
)
def test_states_that_cannot_be_read(spoil: Any, says: str, tmp_path: Path) -> None:
    state = SearchState(tmp_path / "state", RUN)
    state.write({(1, 2): 0.5}, 0)
    spoil(state.path)
    with pytest.raises(DataError, match=says):
        state.resume()


def test_the_state_of_another_search(tmp_path: Path) -> None:
    SearchState(tmp_path / "state", RUN).write({(1, 2): 0.5}, 0)
    other = SearchState(tmp_path / "state", {**RUN, "seed": 3})
    with pytest.raises(
        DataError, match="of another run: seed was 2, now it is 3; use the same arguments"
    ):
        other.resume()


def test_held_out_text_is_measured_by_sequence(model: Any, scores: rd.Scores) -> None:
    text = batches((3, 12), (2, 7))
    task = task_of(scores)
    plan = task.plan((4, 0, 2, 2))
    plans = [masked(model, one.kept) for one in (task.uniform, plan)]
    found = held_out(model, text, *plans)
    values = [
        torch.cat([brute_force(model, inputs, one.kept).flatten() for inputs in text])
        for one in (task.uniform, plan)
    ]
    assert (found.sequences, found.predictions) == (5, 3 * 11 + 2 * 6)
    assert [found.uniform, found.searched] == pytest.approx(
        [float(value.mean()) for value in values], rel=1e-5
    )
    assert found.low < found.searched - found.uniform < found.high
    assert held_out(model, text, *plans) == found
    assert held_out(model, text, *plans, seed=1) != found
    alone = held_out(model, batches((1, 12)), *plans)
    assert (alone.sequences, alone.low, alone.high) == (1, None, None)
    nothing = [{"input_ids": torch.tensor([[5]])}]
    refused = r"held-out sequences contain no prediction that counts; .*`validation=0`"
    with pytest.raises(DataError, match=refused):
        held_out(model, nothing, *plans)


def test_one_held_out_sequence_has_no_interval(scores: rd.Scores) -> None:
    check = HeldOut(1, 100, 0.8, 0.81, None, None)
    notes = search(task_of(scores), Recorder(Pretended()), SETTINGS).checked(check).plan.notes
    assert any(note.endswith("uniform plan 0.8000 (difference +0.0100)") for note in notes)


@pytest.mark.parametrize("searched", [0.79, 0.81])
def test_a_plan_that_loses_is_kept_and_said_so(scores: rd.Scores, searched: float) -> None:
    check = HeldOut(7, 700, 0.8, searched, searched - 0.82, searched - 0.78)
    found = search(task_of(scores), Recorder(Pretended()), SETTINGS).checked(check)
    assert found.check == check
    assert found.plan.allocation == "searched"
    assert (
        f"expected acceptance on 7 held-out sequences {searched:.4f}, of the uniform plan 0.8000 "
        f"(difference {searched - 0.8:+.4f}, 95 % interval {check.low:+.4f} to {check.high:+.4f})"
    ) in found.plan.notes
    worse = [note for note in found.plan.notes if "worse than the uniform plan" in note]
    assert bool(worse) == (searched < 0.8)
