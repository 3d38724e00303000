"""Checkpoints whose layers keep different numbers of experts: what they compute, who loads them and
who refuses them."""

import ast
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM

import reap_driver as rd
from reap_driver.compat.model_config import config_digest, load_config
from reap_driver.compat.pretrained import model_class
from reap_driver.compat.text_model import text_model
from reap_driver.load.streamed_model import open_streamed
from reap_driver.model.discover import find_moe_layers
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.apply import apply_plan
from tests.driver import zoo
from tests.driver.conftest import Pruned
from tests.driver.writer import saved, test_remote
from tests.driver.writer.test_truth import _CHANGED_BY_LOADING, load

# transformers has no class for it; ours is known to reap_driver alone.
_OWN_CLASS = {"step3p7"}


def loader_of(folder: Path) -> Any:
    """The module that lies beside the weights, by itself."""
    spec = importlib.util.spec_from_file_location("load_pruned", folder / "load_pruned.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = text_model(model)(**inputs).logits
    return found


@pytest.mark.parametrize("name", zoo.names())
def test_pruned_checkpoint_equals_masked_original(
    name: str, non_uniform: Callable[[str], Pruned], support: Callable[[str, str, str], None]
) -> None:
    made, (_, original) = non_uniform(name), zoo.tiny(name)
    full, plan, out = made.full, made.plan, made.out
    if name in _CHANGED_BY_LOADING:
        original = rd.load_model(full)
    inputs = zoo.tiny_inputs(name, original.config)
    with rd.masked_experts(original, plan.kept):
        expected = logits(original, inputs)

    pruned = rd.load_model(out)
    kept = {layer.name: layer.num_experts for layer in find_moe_layers(pruned)}
    assert kept == {layer: len(ids) for layer, ids in plan.kept.items()}
    assert len(set(kept.values())) > 1
    actual = logits(pruned, inputs)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)

    with open_streamed(out) as streamed:
        for number in range(len(streamed.layers)):
            streamed.load(number)
        assert torch.equal(logits(streamed.model, inputs), actual)
    if name not in _OWN_CLASS:
        alone = loader_of(out).from_pretrained(out, dtype=torch.float32).eval()
        assert type(alone) is type(pruned)
        if name in _CHANGED_BY_LOADING:
            changed = load(full)
            with rd.masked_experts(changed, plan.kept):
                expected = logits(changed, inputs)
        torch.testing.assert_close(logits(alone, inputs), expected, rtol=2e-5, atol=2e-5)
    support(name, "non-uniform", "pass")


def written(name: str, folder: Path) -> Plan:
    """`full` and `pruned` in a folder, and the plan between them."""
    model = saved.save(name, folder / "full")
    plan = saved.make_plan(folder / "full", model, saved.differing())
    apply_plan(folder / "full", plan, folder / "pruned", non_uniform=True)
    return plan


def test_config_says_the_largest_and_all(tmp_path: Path) -> None:
    plan = written("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["num_local_experts"] == 5
    per_layer = {"model.layers.0.mlp.experts": 5, "model.layers.1.mlp.experts": 4}
    settings = {"count_fields": ["num_local_experts"], "counts": per_layer}
    assert config["experts_per_layer"] == settings
    assert {name: len(kept) for name, kept in plan.kept.items()} == per_layer
    before = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config == {**before, "num_local_experts": 5, "experts_per_layer": settings}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v4", "qwen3_vl_moe", "dbrx"])
def test_transformers_alone_refuses_to_load_it(name: str, tmp_path: Path) -> None:
    """Loudly: no layer is left with random weights."""
    written(name, tmp_path)
    cls = model_class(load_config(tmp_path / "pruned"))
    with pytest.raises(RuntimeError, match=r"(?i)size mismatch|mismatched"):
        cls.from_pretrained(tmp_path / "pruned")


def test_settings_outlive_the_library(tmp_path: Path) -> None:
    """Its own loading and saving of configurations, and of whole models."""
    written("glm4_moe", tmp_path)
    pruned = rd.load_model(tmp_path / "pruned")
    pruned.save_pretrained(tmp_path / "again")
    inputs = zoo.tiny_inputs("glm4_moe", pruned.config)
    assert torch.equal(logits(rd.load_model(tmp_path / "again"), inputs), logits(pruned, inputs))
    config = AutoConfig.from_pretrained(tmp_path / "pruned")
    assert config.experts_per_layer == load_config(tmp_path / "again").experts_per_layer
    assert config_digest(config) != config_digest(load_config(tmp_path / "full"))


def test_the_loader_needs_transformers_alone(tmp_path: Path) -> None:
    """And leaves the library as it was; an ordinary checkpoint passes through it unchanged."""
    written("qwen3_moe", tmp_path)
    tree = ast.parse((tmp_path / "pruned" / "load_pruned.py").read_text())
    imported = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    outside = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert outside == {"torch", "transformers"}
    loader, before = loader_of(tmp_path / "pruned"), dict(vars(Qwen3MoeForCausalLM))
    loader.from_pretrained(tmp_path / "pruned")
    whole = loader.from_pretrained(tmp_path / "full")
    assert {layer.num_experts for layer in find_moe_layers(whole)} == {8}
    assert dict(vars(Qwen3MoeForCausalLM)) == before


def test_layers_follow_the_models_configuration(tmp_path: Path) -> None:
    """What does not count experts reads the model's own configuration; what does, one that says
    the layer's number."""
    written("gemma4", tmp_path)
    model = rd.load_model(tmp_path / "pruned")
    model.set_attn_implementation("sdpa")
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            assert module.config._attn_implementation == "sdpa"
            assert module.config is model.model.config
    counted = [layer.module.config.num_experts for layer in find_moe_layers(model)]
    assert counted == [5, 4]


def test_it_is_observed_like_any_other(tmp_path: Path) -> None:
    """Resident and streamed; and what is observed is the masked original."""
    plan = written("deepseek_v3", tmp_path)
    original, pruned = rd.load_model(tmp_path / "full"), rd.load_model(tmp_path / "pruned")
    inputs = zoo.tiny_inputs("deepseek_v3", original.config)
    with rd.masked_experts(original, plan.kept), rd.observe(original) as masked:
        masked(**inputs)
    with rd.observe(pruned) as seen:
        seen(**inputs)
    streamed = rd.observe_streamed(tmp_path / "pruned", [inputs])
    for name, kept in plan.kept.items():
        layer, truth = seen.stats.layers[name], masked.stats.layers[name]
        assert torch.equal(layer.count, truth.count[:, list(kept)])
        torch.testing.assert_close(layer.sums, truth.sums[..., list(kept)], rtol=2e-5, atol=0)
        assert torch.equal(streamed.layers[name].sums, layer.sums)


@pytest.mark.parametrize("name", ["qwen3_moe", "inkling", "qwen3_vl_moe"])
@pytest.mark.parametrize("same", [True, False])
def test_it_can_be_pruned_again(name: str, same: bool, tmp_path: Path) -> None:
    """To one number, so that anybody loads it again, or to others."""
    written(name, tmp_path)
    half, out = tmp_path / "pruned", tmp_path / "out"
    model = rd.load_model(half)
    keep = iter((3, 3, 3) if same else (5, 3, 3))
    plan = saved.make_plan(
        half, model, lambda layer, _: list(range(layer.num_experts))[-next(keep) :]
    )
    report = apply_plan(half, plan, out, non_uniform=not same)
    assert report.uniform is same
    assert (out / "load_pruned.py").exists() is not same
    assert ("experts_per_layer" in json.loads((out / "config.json").read_text())) is not same
    inputs = zoo.tiny_inputs(name, model.config)
    again = load(out) if same else rd.load_model(out)
    with rd.masked_experts(model, plan.kept):
        expected = logits(model, inputs)
    torch.testing.assert_close(logits(again, inputs), expected, rtol=2e-5, atol=2e-5)


def test_experts_in_a_list(tmp_path: Path) -> None:
    """Model code of the checkpoint, one module an expert."""
    original = test_remote.save(tmp_path / "full", tower={"num_experts": 8})
    plan = test_remote.plan_for(tmp_path / "full")
    kept = {**plan.kept, "layers.1.mlp.experts": (1, 4, 6, 7)}
    layers = {name: LayerPlan.keeping(8, ids) for name, ids in kept.items()}
    out = tmp_path / "pruned"
    apply_plan(
        tmp_path / "full",
        replace(plan, layers=layers),
        out,
        trust_remote_code=True,
        non_uniform=True,
    )
    assert json.loads((out / "config.json").read_text())["tower"] == {"num_experts": 8}
    inputs = {"input_ids": torch.arange(3, 40)[None]}
    with rd.masked_experts(original, kept):
        expected = logits(original, inputs)
    pruned = rd.load_model(out, trust_remote_code=True)
    alone = loader_of(out).from_pretrained(out, trust_remote_code=True).eval()
    for model in (pruned, alone):
        assert [len(layer.mlp.experts) for layer in model.layers] == [5, 4]
        torch.testing.assert_close(logits(model, inputs), expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
