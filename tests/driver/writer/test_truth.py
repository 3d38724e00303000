"""The truth test of the writer, for every architecture: a checkpoint pruned by files, loaded by
transformers, computes what the original computes with its router masked to the kept experts."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import model_class
from reap_driver.compat.text_model import text_model
from reap_driver.model.discover import find_moe_layers
from reap_driver.writer.apply import apply_plan
from tests.driver import zoo
from tests.driver.writer import saved

# from_pretrained itself resets the last entry of zaya's `balancing_biases`, so the original is read
# back from disk too.
_CHANGED_BY_LOADING = frozenset({"zaya"})
# Routers of experts that no text is routed to.
_UNREAD = re.compile(r"vision|talker")


def load(folder: Path) -> PreTrainedModel:
    """Load with transformers; nothing may be missing, unexpected or of another shape."""
    cls = model_class(load_config(folder))
    model, info = cls.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    problems = {what: found for what, found in info.items() if found}
    assert not problems, problems
    return model.eval()


@pytest.mark.parametrize("name", zoo.names())
def test_pruned_checkpoint_equals_masked_original(
    name: str,
    original: Callable[[str], Path],
    tmp_path: Path,
    support: Callable[[str, str, str], None],
) -> None:
    full, (_, model) = original(name), zoo.tiny(name)
    plan = saved.make_plan(full, model)

    report = apply_plan(full, plan, tmp_path / "pruned")

    pruned = load(tmp_path / "pruned")
    if name in _CHANGED_BY_LOADING:
        model = load(full)
    inputs = zoo.tiny_inputs(name, model.config)
    with torch.no_grad():
        unmasked = text_model(model)(**inputs).logits
        with rd.masked_experts(model, plan.kept) as mask:
            expected = text_model(model)(**inputs).logits
        actual = text_model(pruned)(**inputs).logits

    assert mask.removed, "no router was found, so the comparison would prove nothing"
    assert not {router for router in mask.unused if not _UNREAD.search(router)}, "router not masked"
    assert {layer.num_experts for layer in find_moe_layers(pruned)} == {report.experts_after}
    assert not torch.allclose(unmasked, expected, rtol=1e-3, atol=1e-3), "masking changed nothing"
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    support(name, "checkpoint", "pass")


def test_masked_logits_tell_plans_apart(tmp_path: Path) -> None:
    """The comparison's own tool: another choice of experts gives other logits, so a writer that
    mixed experts up would be seen."""
    original = saved.save("qwen3_moe", tmp_path / "full")
    plans = [saved.make_plan(tmp_path / "full", original, seed=seed) for seed in (0, 1)]
    inputs, logits = zoo.tiny_inputs("qwen3_moe", original.config), []
    for plan in plans:
        with torch.no_grad(), rd.masked_experts(original, plan.kept) as mask:
            logits.append(original(**inputs).logits)
        assert len(mask.removed) == len(plan.layers)
        assert not mask.unused
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)
