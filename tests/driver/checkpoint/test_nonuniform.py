"""Checkpoints whose layers keep different numbers of experts: what they compute, who loads them and
who refuses them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.checkpoint import apply_plan
from reap_driver.discover import find_moe_layers
from reap_driver.loading import open_streamed
from tests.driver import zoo
from tests.driver.checkpoint import saved
from tests.driver.checkpoint.test_truth import _CHANGED_BY_LOADING, _REFUSED, load

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
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("name", [name for name in zoo.names() if name not in _REFUSED])
def test_pruned_checkpoint_equals_masked_original(
    name: str, tmp_path: Path, support: Callable[[str, str, str], None]
) -> None:
    full, out = tmp_path / "full", tmp_path / "pruned"
    original = saved.save(name, full)
    plan = saved.make_plan(full, original, saved.differing())
    apply_plan(full, plan, out, non_uniform=True)
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
