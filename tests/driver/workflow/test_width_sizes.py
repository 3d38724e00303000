"""Sizes of plans that remove neurons, foreseen by headers and by the configuration alone: what is
foreseen is what is written.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import reap_driver as rd
from reap_driver.model.discover import MoELayer, find_moe_layers
from reap_driver.planning.plan import Plan
from reap_driver.workflow.inspection import inspect_model
from reap_driver.workflow.options import WriteOptions
from reap_driver.workflow.rank_options import RankOptions
from reap_driver.workflow.sizes import Sizing, sizing_of
from reap_kernels.errors import PlanError
from tests.driver.writer import narrow_plans, saved
from tests.driver.writer.test_truth import load

# Stacked and per expert, transposed with biases, without a gate, two stacks of one model, and
# shared experts that stay as wide, of which one becomes wider.
NAMES = ["qwen3_moe", "gpt_oss", "nemotron_h", "qwen3_omni_moe_whole", "deepseek_v3"]


def sizing(folder: Path) -> Sizing:
    model = inspect_model(str(folder))
    return sizing_of(model, WriteOptions(), dtype="auto", trust=False)


def narrowed(full: Path, width: narrow_plans.Width) -> tuple[Plan, dict[str, object]]:
    model = load(full)
    plan = narrow_plans.narrow_plan(full, model, width)
    return plan, narrow_plans.random_matrices(model, plan)


def layers_of(folder: Path) -> list[MoELayer]:
    return find_moe_layers(load(folder))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_foreseen_is_written(
    name: str, original: Callable[[str], Path], tmp_path: Path
) -> None:
    full, out = original(name), tmp_path / "narrow"
    plan, matrices = narrowed(full, narrow_plans.two_thirds)
    by_headers = sizing(full)
    left = by_headers.leaves(plan, RankOptions(ratio=0.5))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(full / "config.json", bare)
    model = inspect_model(str(bare))
    estimate = Sizing(model, bare, None, WriteOptions(), dtype="float32", trust=False)

    rd.apply_plan(full, plan, out, matrices=matrices)

    assert left.exact
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert left.weights[1] == written
    parameters = sum(tensor.numel() for tensor in load(out).parameters())
    assert left.parameters == (sum(t.numel() for t in load(full).parameters()), parameters)
    assert estimate.leaves(plan, RankOptions(ratio=0.5)).parameters == left.parameters
    assert {la.name: la.num_experts for la in layers_of(out)} == {
        name: after for name, (_, after) in left.experts.items()
    }
    assert left.neurons == plan.widths
    [line] = [line for line in left.lines() if line.startswith("neurons")]
    pairs = sorted(set(plan.widths.values()))
    assert line.split(maxsplit=1)[1].startswith(f"{pairs[0][0]} -> {pairs[0][1]}")
    assert left.facts()["neurons_by_layer"] == {n: list(pair) for n, pair in plan.widths.items()}


def test_plans_of_the_same_experts_have_sizes_of_their_own(
    original: Callable[[str], Path],
) -> None:
    full = original("qwen3_moe")
    known = sizing(full)
    whole = saved.make_plan(full, load(full), saved.scattered)
    wide, _ = narrowed(full, narrow_plans.two_thirds)
    slim, _ = narrowed(full, narrow_plans.half)
    assert [len(plan.layers) for plan in (whole, wide, slim)] == [2, 2, 2]
    sizes = [known.files(plan).weights for plan in (whole, wide, slim)]
    assert sizes == sorted(set(sizes), reverse=True)
    assert known.largest([slim, wide]) is wide


def test_layers_of_the_same_width_cannot_be_left_out(original: Callable[[str], Path]) -> None:
    """The plan's own check does not know the model's other layers; the sizes do."""
    full = original("qwen3_moe")
    model = load(full)
    whole = saved.make_plan(full, model, lambda layer, _: list(range(layer.num_experts)))
    plan = narrow_plans.narrowed(whole, model, narrow_plans.half)
    name, other = plan.layers
    part = Plan(plan.model, "x", "uniform", 0.5, {name: plan.layers[name]}, "")
    words = rf"leaves 12 neurons.*{name}.*24 neurons in the experts of layer '{other}'"
    with pytest.raises(PlanError, match=words):
        sizing(full).leaves(part, RankOptions(ratio=0.5))
