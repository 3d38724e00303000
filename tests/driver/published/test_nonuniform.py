"""Published layouts and formats with other numbers of experts in every other layer: the bytes, the
order, and what loads the result."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import reap_driver as rd
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.evaluation.audit import check_permutation
from reap_driver.planning.plan import LayerPlan, Plan
from tests.driver.published.expected import expected_tensors, read_tensors, same_bytes
from tests.driver.published.models import MODELS
from tests.driver.published.test_pipeline import generates, kept_by_block
from tests.driver.streaming import packing
from tests.driver.writer import saved
from tests.driver.writer.test_nonuniform import loader_of

Checkpoints = Callable[[str], Path]


def plan_for(source: Path) -> Plan:
    """Every other layer loses the second expert of every routing group."""
    layers = {}
    for place, layer in enumerate(rd.find_moe_layers(meta_model(load_config(source)))):
        size = layer.num_experts // layer.n_group
        gone = set(range(1, layer.num_experts, size)) if place % 2 == 0 else set()
        kept = tuple(e for e in range(layer.num_experts) if e not in gone)
        layers[layer.name] = LayerPlan.keeping(layer.num_experts, kept)
    plan = saved.make_plan(source, meta_model(load_config(source)))
    return Plan(plan.model, "reap", "global", 0.1, layers, "sha256:0")


@pytest.mark.parametrize("name", MODELS)
def test_every_other_layer_is_cut(name: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    entry, source, out = MODELS[name], checkpoint(name), tmp_path / "pruned"
    plan = plan_for(source)
    assert len({len(kept) for kept in plan.kept.values()}) == 2
    rd.apply_plan(source, plan, out, non_uniform=True)
    config = json.loads((source / "config.json").read_text())
    expected = expected_tensors(entry, config, read_tensors(source), kept_by_block(plan, entry))
    written = read_tensors(out)
    assert written.keys() == expected.keys()
    assert not [key for key in written if not same_bytes(written[key], expected[key])]
    assert check_permutation(source, out, plan) == []
    model = rd.load_model(out)
    counts = [layer.num_experts for layer in rd.find_moe_layers(model)]
    assert counts == [len(kept) for kept in plan.kept.values()]
    if entry.not_plain is None and hasattr(transformers, config["architectures"][0]):
        state = loader_of(out).from_pretrained(out, dtype="auto").state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(same_bytes(state[key], value) for key, value in model.state_dict().items())
    generates(model, out)


def test_four_bit_integers(tmp_path: Path) -> None:
    """Experts stored by compressed-tensors, as in Kimi-K2."""
    quantize = {packing.ROUTED: "int4"}
    source, _ = packing.checkpoints("deepseek_v3", tmp_path, quantize, packing.KIMI)
    plan, out = plan_for(source), tmp_path / "pruned"
    rd.apply_plan(source, plan, out, non_uniform=True)
    assert check_permutation(source, out, plan) == []
    original, pruned = rd.load_model(source), rd.load_model(out, device_map={"": "cpu"})
    inputs = {"input_ids": torch.arange(3, 35).view(2, 16)}
    with torch.no_grad(), rd.masked_experts(original, plan.kept):
        expected = original(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(pruned(**inputs).logits, expected, rtol=2e-2, atol=2e-2)
