"""Constants that stand for experts, as a file: their formula, what the file holds, bad input."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.planning.plan import LayerPlan
from reap_driver.writer.constants_file import FORMAT
from reap_kernels import LayerGram
from reap_kernels.errors import DataError, PlanError
from reap_kernels.tensor_files import write_tensors
from tests.driver import zoo
from tests.driver.observation import oracle
from tests.driver.writer import saved
from tests.driver.writer.test_truth import load

# Stacked, with biases, with identity experts' rows, with weights in the experts' inputs, flat.
NAMES = ["qwen3_moe", "gpt_oss", "step3p7", "llama4", "dbrx"]
Grams = dict[str, LayerGram]


def observed(name: str, model: PreTrainedModel) -> tuple[Grams, dict[str, oracle.Calls]]:
    """Gram sums of a forward, and the inputs of the experts modules."""
    names = [layer.name for layer in rd.find_moe_layers(model)]
    gram = rd.observe(model, gram=True)
    with torch.no_grad(), oracle.recorded(model, names) as calls, gram as obs:
        obs(**zoo.tiny_inputs(name, model.config))
    assert {len(found.inputs) for found in calls.values()} == {1}
    return obs.grams, calls


def formula(layer: rd.MoELayer, calls: oracle.Calls) -> Tensor:
    """sum g^2 f / sum g^2 of every expert in float64, by running it; 0 of those without rows."""
    found = torch.zeros(layer.num_experts, layer.hidden_size, dtype=torch.float64)
    [(hidden, ids, weights)] = calls.inputs
    for expert in range(layer.num_experts):
        token, slot = torch.where((ids == expert) & (weights != 0))
        if not len(token):
            continue
        gate = weights[token, slot].double()
        if layer.adapter == "llama4":  # the weight is in the row, and the output has none
            outputs = oracle._llama4_outputs(layer.module, hidden[token], gate, expert)
            found[expert] = outputs.mean(0)
            continue
        outputs = oracle.expert_outputs(layer.module, hidden[token], expert)
        square = gate.square()
        found[expert] = square @ outputs / square.sum()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_constants_are_the_formula(
    name: str, original: Callable[[str], Path], tmp_path: Path
) -> None:
    full = original(name)
    model = load(full)
    grams, calls = observed(name, model)
    made = rd.export_constants(full, grams, tmp_path / "constants")
    layers = rd.find_moe_layers(model)
    assert list(made) == [layer.name for layer in layers]
    for layer in layers:
        want = formula(layer, calls[layer.name])
        assert bool(want.any())
        torch.testing.assert_close(made[layer.name].double(), want, rtol=1e-4, atol=1e-6)
    stored = load_file(tmp_path / "constants")
    assert all(torch.equal(stored[layer], constants) for layer, constants in made.items())
    read = rd.load_constants(tmp_path / "constants")
    for layer, constants in made.items():
        assert list(read[layer]) == list(range(len(constants)))
        assert torch.equal(torch.stack(list(read[layer].values())), constants)


@pytest.fixture
def full(original: Callable[[str], Path]) -> Path:
    return original("qwen3_moe")


@pytest.fixture
def grams(full: Path) -> Grams:
    return observed("qwen3_moe", load(full))[0]


def test_a_plan_says_which_experts_and_a_folder_gives_the_same(
    full: Path, grams: Grams, tmp_path: Path
) -> None:
    model = load(full)
    plan = saved.make_plan(full, model)
    first, second = plan.layers
    whole = LayerPlan.keeping(8, tuple(range(8)))
    plan = replace(plan, layers={**plan.layers, second: whole})
    every = rd.export_constants(full, grams, tmp_path / "every")
    writer = rd.GramWriter(tmp_path / "sums", list(grams))
    for name, sums in grams.items():
        writer.put(name, sums)
    folder = writer.finish(rd.record_of(model))
    for given in (grams, folder, tmp_path / "sums"):
        made = rd.export_constants(full, given, tmp_path / "constants", plan=plan)
        assert list(made) == [first]
        kept, removed = (list(ids) for ids in (plan.layers[first].kept, plan.layers[first].removed))
        assert not bool(made[first][kept].any())
        assert torch.equal(made[first][removed], every[first][removed])
        assert list(rd.load_constants(tmp_path / "constants")[first]) == removed


def test_experts_without_rows_have_zero(full: Path, grams: Grams, tmp_path: Path) -> None:
    for sums in grams.values():
        sums.first[3], sums.weight[3], sums.count[3] = 0, 0, 0
    made = rd.export_constants(full, grams, tmp_path / "constants")
    assert not any(bool(constants[3].any()) for constants in made.values())
    assert all(bool(constants.isfinite().all()) for constants in made.values())


def test_what_does_not_fit_is_refused(full: Path, grams: Grams, tmp_path: Path) -> None:
    plan = saved.make_plan(full, load(full))
    first, second = grams
    out = tmp_path / "constants"
    narrow = {**grams, second: LayerGram(8, 23)}
    with pytest.raises(DataError, match=rf"8 experts of 23 neurons for layer '{second}'"):
        rd.export_constants(full, narrow, out)
    with pytest.raises(DataError, match=r"for layer 'layers.9', which .* does not have"):
        rd.export_constants(full, {"layers.9": grams[first]}, out)
    with pytest.raises(DataError, match=rf"no sums of layer '{second}', of which the plan removes"):
        rd.export_constants(full, {first: grams[first]}, out, plan=plan)
    whole = {name: LayerPlan.keeping(8, tuple(range(8))) for name in plan.layers}
    with pytest.raises(PlanError, match="removes no expert"):
        rd.export_constants(full, grams, out, plan=replace(plan, layers=whole))
    other = replace(plan, model={**plan.model, "model_type": "mixtral"})
    with pytest.raises(PlanError, match="model_type"):
        rd.export_constants(full, grams, out, plan=other)
    writer = rd.GramWriter(tmp_path / "sums", list(grams))
    writer.put(first, grams[first])
    record = rd.record_of(load(full))
    writer.finish({**record, "model": {**record["model"], "model_type": "mixtral"}})
    with pytest.raises(DataError, match=r"sums: are not of .*model_type"):
        rd.export_constants(full, tmp_path / "sums", out)
    assert not out.exists()


def test_other_files_are_no_constants(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.ones(2, 3)}, path)
    with pytest.raises(DataError, match=r"not a constants file: .*export_constants"):
        rd.load_constants(path)
    for tensor, experts, says in (
        (torch.ones(2, 3), {"b": [0]}, "other layers than its head"),
        (torch.ones(2, 3), {"a": [2]}, r"of experts \[2\]"),
        (torch.ones(2), {"a": [0]}, r"torch.float32 \[2\]"),
        (torch.ones(2, 3).half(), {"a": [0]}, "torch.float16"),
    ):
        head = {"model": {"id": "m"}, "experts": experts}
        write_tensors({"a": tensor}, path, FORMAT, head)
        with pytest.raises(DataError, match=says):
            rd.load_constants(path)
