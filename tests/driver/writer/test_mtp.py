"""Multi-token-prediction layers: dropped with their config fields, or pruned when the plan names
them.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.apply import apply_plan
from reap_kernels.errors import PlanError, UsageError
from tests.driver.writer import narrow_plans, saved
from tests.driver.writer.test_packed_router import Codes

MTP = "model.layers.3."  # the tiny model has layers 0 to 2
LAYER = "model.layers.3.mlp.experts"
KEPT = (0, 2, 3, 4, 6, 7)  # three of each routing group


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """GLM-4.5 shape with an MTP layer of the same kind as layer 1, as published checkpoints have
    it.
    """
    folder = tmp_path / "full"
    saved.save("glm4_moe", folder)

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copied = {
            key.replace("model.layers.1.", MTP): torch.randn_like(value)
            for key, value in tensors.items()
            if key.startswith("model.layers.1.")
        }
        extra = {f"{MTP}eh_proj.weight": torch.randn(32, 64), f"{MTP}enorm.weight": torch.randn(32)}
        return {**tensors, **copied, **extra}

    saved.change_tensors(folder, add)
    saved.change_config(folder, num_nextn_predict_layers=1)
    return folder


def plan_for(full: Path) -> Plan:
    return saved.make_plan(full, meta_model(load_config(full)))


def test_dropped_by_default_and_reported(full: Path, tmp_path: Path) -> None:
    before = saved.read_all(full)
    report = apply_plan(full, plan_for(full), tmp_path / "out")
    after = saved.read_all(tmp_path / "out")
    assert set(report.mtp_dropped) == {key for key in before if key.startswith(MTP)}
    assert not [key for key in after if key.startswith(MTP)]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert report.edited_config["num_nextn_predict_layers"] == (1, 0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{len(report.mtp_dropped)} tensors of multi-token" in card


def test_kept_when_the_plan_names_its_experts(full: Path, tmp_path: Path) -> None:
    plan = plan_for(full)
    plan = replace(plan, layers={**plan.layers, LAYER: LayerPlan.keeping(8, KEPT)})
    before = saved.read_all(full)
    report = apply_plan(full, plan, tmp_path / "out", mtp="keep")
    after = saved.read_all(tmp_path / "out")
    kept = plan.layers[LAYER].kept
    assert report.mtp_dropped == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    for new, old in enumerate(kept):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"{projection}.weight"
            assert torch.equal(after[f"{LAYER}.{new}.{name}"], before[f"{LAYER}.{old}.{name}"])
    assert f"{LAYER}.{len(kept)}.up_proj.weight" not in after
    for name in ("mlp.gate.weight", "mlp.gate.e_score_correction_bias"):
        assert torch.equal(after[MTP + name], before[MTP + name][list(kept)])
    for name in ("eh_proj.weight", "enorm.weight", "mlp.shared_experts.up_proj.weight"):
        assert torch.equal(after[MTP + name], before[MTP + name])


def test_not_kept_beside_experts_that_change(full: Path, tmp_path: Path) -> None:
    model = meta_model(load_config(full))
    plan = narrow_plans.narrow_plan(full, model)
    matrices = narrow_plans.random_matrices(model, plan)
    cut = LayerPlan.keeping(8, KEPT, 24, tuple(tuple(range(16)) for _ in KEPT))
    plan = replace(plan, layers={**plan.layers, LAYER: cut})
    matrices[LAYER] = torch.ones(6, 32, 16)
    with pytest.raises(PlanError, match=r"layers\.3.*multi-token-prediction.*mtp='drop'"):
        apply_plan(full, plan, tmp_path / "out", mtp="keep", matrices=matrices)


def test_kept_with_a_number_of_its_own(full: Path, tmp_path: Path) -> None:
    """Where layers keep different numbers, an MTP layer's is its own too."""
    plan = saved.make_plan(full, meta_model(load_config(full)), saved.differing())
    assert {len(kept) for kept in plan.kept.values()} == {6, 8}
    kept = (1, 5)
    plan = replace(plan, layers={**plan.layers, LAYER: LayerPlan.keeping(8, kept)})
    before = saved.read_all(full)
    apply_plan(full, plan, tmp_path / "out", mtp="keep", non_uniform=True)
    after = saved.read_all(tmp_path / "out")
    for new, old in enumerate(kept):
        name = "down_proj.weight"
        assert torch.equal(after[f"{LAYER}.{new}.{name}"], before[f"{LAYER}.{old}.{name}"])
    assert f"{LAYER}.2.down_proj.weight" not in after
    gate = f"{MTP}mlp.gate.weight"
    assert torch.equal(after[gate], before[gate][list(kept)])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["experts_per_layer"]
    assert LAYER not in settings["counts"]  # transformers has no such layer

    out = tmp_path / "out"
    again = saved.make_plan(
        out,
        meta_model(load_config(out)),
        lambda layer, _: list(KEPT if layer.num_experts == 8 else range(6)),
    )
    wrong = {**again.layers, LAYER: LayerPlan.keeping(5, kept[:1])}
    with pytest.raises(PlanError, match=rf"counts 5 experts in '{LAYER}', but .* has shape"):
        apply_plan(
            out, replace(again, layers=wrong), tmp_path / "two", mtp="keep", non_uniform=True
        )


def test_another_number_in_the_plan_is_refused(full: Path, tmp_path: Path) -> None:
    plan = saved.make_plan(full, meta_model(load_config(full)), saved.differing())
    for count, says in ((7, "counts 7 .* have 8"), (4, "counts 4 .* have 8")):
        wrong = {**plan.layers, LAYER: LayerPlan.keeping(count, (0, 1))}
        with pytest.raises(PlanError, match=says):
            apply_plan(
                full, replace(plan, layers=wrong), tmp_path / "out", mtp="keep", non_uniform=True
            )


def test_keeping_unplanned_experts_is_refused(full: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=rf"no entry '{LAYER}'.*`mtp='drop'`"):
        apply_plan(full, plan_for(full), tmp_path / "out", mtp="keep")
    assert not (tmp_path / "out").exists()


def test_layer_without_experts_can_be_kept(tmp_path: Path) -> None:
    """Qwen3-Next style: a module called `mtp`, here dense."""
    model = saved.save("qwen3_next", tmp_path / "full")
    dense = {
        "mtp.fc.weight": torch.randn(32, 64),
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(40, 32),
    }
    saved.change_tensors(tmp_path / "full", lambda tensors: {**tensors, **dense})
    plan = saved.make_plan(tmp_path / "full", model)
    apply_plan(tmp_path / "full", plan, tmp_path / "kept", mtp="keep")
    after = saved.read_all(tmp_path / "kept")
    assert all(torch.equal(after[key], value) for key, value in dense.items())
    report = apply_plan(tmp_path / "full", plan, tmp_path / "dropped")
    assert set(report.mtp_dropped) == set(dense)


def test_unknown_choice_is_refused(full: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mtp is 'prune', a str; expected one of 'drop', 'keep'"):
        apply_plan(full, plan_for(full), tmp_path / "out", mtp="prune")  # type: ignore[arg-type]


def test_a_packed_router_is_cut_like_the_main_layers(tmp_path: Path) -> None:
    """The MTP layer's router by the same format, its experts renumbered in the settings too."""
    saved.save("glm4_moe", tmp_path / "full")
    codes = {layer: Codes.random(8, 32, 4, 16) for layer in ("1", "2", "3")}

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copied = {
            key.replace("model.layers.1.", MTP): torch.randn_like(value)
            for key, value in tensors.items()
            if key.startswith("model.layers.1.")
        }
        found = {**tensors, **copied}
        for layer, matrix in codes.items():
            del found[f"model.layers.{layer}.mlp.gate.weight"]
            for leaf, value in matrix.compressed(4).items():
                found[f"model.layers.{layer}.mlp.gate.{leaf}"] = value.clone()
        return found

    saved.change_tensors(tmp_path / "full", add)
    ignore = [f"{LAYER}.{KEPT[4]}.up_proj", f"{LAYER}.1.up_proj"]
    settings = {"quant_method": "compressed-tensors", "ignore": ignore}
    saved.change_config(tmp_path / "full", num_nextn_predict_layers=1, quantization_config=settings)
    plan = plan_for(tmp_path / "full")
    plan = replace(plan, layers={**plan.layers, LAYER: LayerPlan.keeping(8, KEPT)})
    apply_plan(tmp_path / "full", plan, tmp_path / "out", mtp="keep")
    after = saved.read_all(tmp_path / "out")
    for layer, matrix in codes.items():
        stem = f"model.layers.{layer}.mlp.gate."
        leaves = {key.removeprefix(stem): t for key, t in after.items() if key.startswith(stem)}
        kept = plan.layers[f"model.layers.{layer}.mlp.experts"].kept
        matrix.check_compressed(leaves, 4, list(kept))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == [f"{LAYER}.4.up_proj"]
