"""Checkpoints that bring their own model code: one module an expert, other stacks beside."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from reap_driver.compat.model_config import config_digest, load_config
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.apply import apply_plan
from reap_kernels.errors import UnsupportedModel
from tests.driver.writer import remote_code, saved

KEPT = {"layers.0.mlp.experts": (0, 2, 3, 5, 7), "layers.1.mlp.experts": (1, 2, 4, 6, 7)}


def save(folder: Path, **fields: Any) -> remote_code.TinyRemoteForCausalLM:
    """A random model with its code beside it."""
    torch.manual_seed(0)
    model = remote_code.TinyRemoteForCausalLM(remote_code.TinyRemoteConfig(**fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    shutil.copy(remote_code.__file__, folder / "remote_code.py")
    classes = {"AutoConfig": "TinyRemoteConfig", "AutoModelForCausalLM": "TinyRemoteForCausalLM"}
    saved.change_config(
        folder,
        architectures=["TinyRemoteForCausalLM"],
        auto_map={auto: f"remote_code.{name}" for auto, name in classes.items()},
    )
    return model.eval()


def plan_for(folder: Path) -> Plan:
    """Keeps `KEPT`."""
    config = load_config(folder, trust_remote_code=True)
    layers = {name: LayerPlan.keeping(8, kept) for name, kept in KEPT.items()}
    model = {"id": "acme/remote", "config_digest": config_digest(config)}
    return Plan(model, "reap", "uniform", 3 / 8, layers, "sha256:0")


def test_listed_experts_are_found_and_the_code_travels(tmp_path: Path) -> None:
    """Here experts are not stacked in memory either: the smaller model lacks their names."""
    original = save(tmp_path / "full")
    apply_plan(
        tmp_path / "full", plan_for(tmp_path / "full"), tmp_path / "out", trust_remote_code=True
    )
    pruned, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    for name, kept in KEPT.items():
        gate = original.get_submodule(name.replace("experts", "gate"))
        removed = sorted(set(range(8)) - set(kept))
        gate.register_forward_hook(
            lambda _, __, out, rows=removed: out.index_fill(1, torch.tensor(rows), -torch.inf)
        )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, actual = original(ids).logits, pruned(ids).logits
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_code_is_not_run_unless_trusted(tmp_path: Path) -> None:
    save(tmp_path / "full")
    plan = plan_for(tmp_path / "full")
    with pytest.raises(UnsupportedModel, match="trust_remote_code"):
        apply_plan(tmp_path / "full", plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_stack_keeps_its_count(tmp_path: Path) -> None:
    """Two counts of the same value: only the field that the planned layers read is edited."""
    save(tmp_path / "full", tower={"num_experts": 8})
    apply_plan(
        tmp_path / "full", plan_for(tmp_path / "full"), tmp_path / "out", trust_remote_code=True
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == 5
    assert config["tower"] == {"num_experts": 8}
    before, after = saved.read_all(tmp_path / "full"), saved.read_all(tmp_path / "out")
    assert torch.equal(before["tower.scores.weight"], after["tower.scores.weight"])
