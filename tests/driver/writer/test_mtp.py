"""Multi-token-prediction layers: dropped with their config fields, pruned, or kept whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.apply import apply_plan, check_plan
from reap_driver.writer.mtp import MtpLayer
from reap_kernels.errors import CheckpointError, PlanError, UnsupportedModel, UsageError
from tests.driver.writer import narrow_plans, saved
from tests.driver.writer.test_packed_router import Codes

MTP = "model.layers.3."  # the tiny model has layers 0 to 2
LAYER = "model.layers.3.mlp.experts"
LAST = "model.layers.2.mlp.experts"
KEPT = (0, 2, 3, 4, 6, 7)  # three of each routing group
Tensors = dict[str, torch.Tensor]


def add_layer(folder: Path, like: str, mtp: str, extra: Tensors | None = None) -> None:
    """Adds an MTP layer with random tensors of the kind of another layer, and further tensors."""

    def add(tensors: Tensors) -> Tensors:
        copied = {
            mtp + key.removeprefix(like): torch.randn(value.shape).to(value.dtype)
            for key, value in tensors.items()
            if key.startswith(like)
        }
        assert any("experts" in key for key in copied)
        return {**tensors, **copied, **(extra or {})}

    saved.change_tensors(folder, add)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """GLM-4.5 shape with an MTP layer of the same kind as layer 1, as published checkpoints have
    it.
    """
    folder = tmp_path / "full"
    saved.save("glm4_moe", folder)
    extra = {f"{MTP}eh_proj.weight": torch.randn(32, 64), f"{MTP}enorm.weight": torch.randn(32)}
    add_layer(folder, "model.layers.1.", MTP, extra)
    saved.change_config(folder, num_nextn_predict_layers=1)
    return folder


def plan_for(full: Path) -> Plan:
    return saved.make_plan(full, meta_model(load_config(full)))


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def check_cut(full: Path, out: Path, kept: tuple[int, ...]) -> None:
    """The MTP layer of the GLM-4.5 shape: kept experts in their order, rows of the router, and all
    else as it was.
    """
    before, after = saved.read_all(full), saved.read_all(out)
    expected: Tensors = {}
    for key, value in before.items():
        if not key.startswith(MTP):
            continue
        index = key.removeprefix(LAYER + ".").partition(".")[0]
        if key.startswith(f"{MTP}mlp.gate."):
            expected[key] = value[list(kept)]
        elif not index.isdigit():
            expected[key] = value
        elif int(index) in kept:
            new = kept.index(int(index))
            expected[key.replace(f"experts.{index}.", f"experts.{new}.")] = value
    found = {key: value for key, value in after.items() if key.startswith(MTP)}
    assert found.keys() == expected.keys()
    assert all(saved.same_bytes(found[key], expected[key]) for key in expected)


def test_dropped_by_default_and_reported(full: Path, tmp_path: Path) -> None:
    before = saved.read_all(full)
    report = apply_plan(full, plan_for(full), tmp_path / "out")
    after = saved.read_all(tmp_path / "out")
    assert set(report.mtp_dropped) == {key for key in before if key.startswith(MTP)}
    assert (report.mtp_tensors, report.mtp_layers) == (0, {})
    assert not [key for key in after if key.startswith(MTP)]
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert report.edited_config["num_nextn_predict_layers"] == (1, 0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{len(report.mtp_dropped)} tensors of multi-token" in card


def test_pruned_by_the_last_layers_scores(full: Path, tmp_path: Path) -> None:
    plan = plan_for(full)
    kept = plan.layers[LAST].kept
    assert kept != plan.layers["model.layers.1.mlp.experts"].kept
    report = apply_plan(full, plan, tmp_path / "out", mtp="prune")
    check_cut(full, tmp_path / "out", kept)
    assert report.mtp_dropped == []
    assert report.mtp_tensors == sum(k.startswith(MTP) for k in saved.read_all(tmp_path / "out"))
    assert report.mtp_layers == {LAYER: MtpLayer(8, kept, LAST)}
    config = config_of(tmp_path / "out")
    assert config["num_nextn_predict_layers"] == 1
    assert config["n_routed_experts"] == len(kept)
    [note] = [note for note in report.plan.notes if LAYER in note]
    assert note == (
        f"{LAYER} (multi-token prediction): not observed; the experts with the ids that {LAST} "
        "keeps stay, by that layer's scores."
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by that layer's scores" in card
    assert f"{report.mtp_tensors} tensors of multi-token-prediction layers" in card
    recorded = Plan.load(tmp_path / "out" / "reap" / "plan.json")
    assert note in recorded.notes
    assert LAYER not in recorded.layers


def test_pruned_by_the_plans_own_entry(full: Path, tmp_path: Path) -> None:
    plan = plan_for(full)
    plan = replace(plan, layers={**plan.layers, LAYER: LayerPlan.keeping(8, KEPT)})
    report = apply_plan(full, plan, tmp_path / "out", mtp="prune")
    check_cut(full, tmp_path / "out", KEPT)
    assert report.mtp_layers == {LAYER: MtpLayer(8, KEPT)}
    assert not [note for note in report.plan.notes if LAYER in note]


@pytest.mark.parametrize("choice", ["prune", "keep"])
def test_not_written_beside_experts_that_lose_neurons(
    full: Path, tmp_path: Path, choice: Any
) -> None:
    model = meta_model(load_config(full))
    plan = narrow_plans.narrow_plan(full, model)
    matrices = narrow_plans.random_matrices(model, plan)
    cut = LayerPlan.keeping(8, KEPT, 24, tuple(tuple(range(16)) for _ in KEPT))
    for layers in ({}, {LAYER: cut} if choice == "prune" else {}):
        wide = replace(plan, layers={**plan.layers, **layers})
        given = {**matrices, **{name: torch.ones(6, 32, 16) for name in layers}}
        with pytest.raises((PlanError, UnsupportedModel), match=r"layers\.3.*mtp='drop'"):
            apply_plan(full, wide, tmp_path / "out", mtp=choice, matrices=given)


def test_pruned_with_a_number_of_its_own(full: Path, tmp_path: Path) -> None:
    """Where layers keep different numbers, an MTP layer's is its own too."""
    plan = saved.make_plan(full, meta_model(load_config(full)), saved.differing())
    assert {len(kept) for kept in plan.kept.values()} == {6, 8}
    kept = (1, 5)
    plan = replace(plan, layers={**plan.layers, LAYER: LayerPlan.keeping(8, kept)})
    out = tmp_path / "out"
    apply_plan(full, plan, out, mtp="prune", non_uniform=True)
    check_cut(full, out, kept)
    settings = config_of(out)["experts_per_layer"]
    assert LAYER not in settings["counts"]  # transformers has no such layer

    again = saved.make_plan(
        out,
        meta_model(load_config(out)),
        lambda layer, _: list(KEPT if layer.num_experts == 8 else range(6)),
    )
    wrong = {**again.layers, LAYER: LayerPlan.keeping(5, kept[:1])}
    with pytest.raises(PlanError, match=rf"counts 5 experts in '{LAYER}', but .* has shape"):
        apply_plan(
            out, replace(again, layers=wrong), tmp_path / "two", mtp="prune", non_uniform=True
        )


@pytest.mark.parametrize("mtp_only", [False, True])
def test_one_count_for_all_is_needed_where_it_is_written(
    full: Path, tmp_path: Path, mtp_only: bool
) -> None:
    main, own = (range(8), KEPT) if mtp_only else (KEPT, range(8))
    plan = saved.make_plan(full, meta_model(load_config(full)), lambda *_: list(main))
    layers = {**plan.layers, LAYER: LayerPlan.keeping(8, tuple(own))}
    plan = replace(plan, layers=layers, ratio=0.1)
    with pytest.raises(PlanError, match=r"counts both\. Engines build .*`mtp='drop'`"):
        apply_plan(full, plan, tmp_path / "out", mtp="prune")
    if not mtp_only:
        report = apply_plan(full, plan, tmp_path / "out", mtp="drop")
        assert report.mtp_dropped
        with pytest.raises(UnsupportedModel, match="cannot keep all 8 experts"):
            apply_plan(full, plan, tmp_path / "kept", mtp="keep")


def test_another_number_in_the_plan_is_refused(full: Path, tmp_path: Path) -> None:
    plan = saved.make_plan(full, meta_model(load_config(full)), saved.differing())
    for count, says in ((7, "counts 7 .* have 8"), (4, "counts 4 .* have 8")):
        wrong = {**plan.layers, LAYER: LayerPlan.keeping(count, (0, 1))}
        with pytest.raises(PlanError, match=says):
            apply_plan(
                full, replace(plan, layers=wrong), tmp_path / "out", mtp="prune", non_uniform=True
            )


def test_kept_whole_only_where_config_json_can_say_it(full: Path, tmp_path: Path) -> None:
    plan, out = plan_for(full), tmp_path / "out"
    needs = (
        rf"{LAYER}: .* cannot keep all 8 experts while the other layers keep 6: engines read "
        rf"n_routed_experts .* 'glm4_moe' .*qwen4_exp.* mtp_num_experts .*`mtp='prune'`.*{full} as "
        "`model` of vLLM"
    )
    for check in (apply_plan, check_plan):
        with pytest.raises(UnsupportedModel, match=needs):
            check(full, plan, out, mtp="keep")
    assert not out.exists()
    entry = replace(plan, layers={**plan.layers, LAYER: LayerPlan.keeping(8, KEPT)})
    with pytest.raises(PlanError, match=rf"removes 2 experts of '{LAYER}'.*`mtp='keep'`.*'prune'"):
        apply_plan(full, entry, out, mtp="keep")


def test_kept_whole_under_the_count_that_the_source_has(full: Path, tmp_path: Path) -> None:
    """Where config.json counts the experts of MTP layers apart, pruning them edits that number."""
    saved.change_config(full, mtp_num_experts=8)
    plan = plan_for(full)
    kept = tmp_path / "kept"
    report = apply_plan(full, plan, kept, mtp="keep")
    check_cut(full, kept, tuple(range(8)))
    assert report.mtp_layers == {LAYER: MtpLayer(8, tuple(range(8)))}
    assert {name: config_of(kept)[name] for name in ("mtp_num_experts", "n_routed_experts")} == {
        "mtp_num_experts": 8,
        "n_routed_experts": 6,
    }
    apply_plan(full, plan, tmp_path / "pruned", mtp="prune")
    assert config_of(tmp_path / "pruned")["mtp_num_experts"] == 6


def test_kept_whole_where_an_engine_reads_a_count_of_its_own(tmp_path: Path) -> None:
    """Qwen4-Exp: the field is written beside that of the other layers, and is said to be read."""
    full, out = tmp_path / "full", tmp_path / "out"
    model = saved.save("qwen4_exp", full)
    add_layer(full, "model.layers.1.", "mtp.layers.0.", {"mtp.fc.weight": torch.randn(32, 64)})
    plan = saved.make_plan(full, model)
    before = {k: v for k, v in saved.read_all(full).items() if k.startswith("mtp.")}
    report = apply_plan(full, plan, out, mtp="keep")
    after = {k: v for k, v in saved.read_all(out).items() if k.startswith("mtp.")}
    assert after.keys() == before.keys()
    assert all(saved.same_bytes(after[key], before[key]) for key in before)
    [field] = [name for name in report.edited_config if name.endswith("num_experts")][:1]
    config = config_of(out)
    assert config["mtp_num_experts"] == 8
    assert config[field] == 5
    assert any("mtp_num_experts" in note and "oMLX" in note for note in report.plan.notes)
    meta_model(load_config(out))  # the field is nothing to transformers

    pruned = apply_plan(full, plan, tmp_path / "pruned", mtp="prune")
    [(name, layer)] = pruned.mtp_layers.items()
    assert name.startswith("mtp.layers.0.")
    assert layer.like == max(plan.layers)
    assert "mtp_num_experts" not in config_of(tmp_path / "pruned")


@pytest.mark.parametrize("choice", ["prune", "keep"])
def test_layer_without_experts_is_copied(tmp_path: Path, choice: Any) -> None:
    """Qwen3-Next style: a module called `mtp`, here dense."""
    model = saved.save("qwen3_next", tmp_path / "full")
    dense = {
        "mtp.fc.weight": torch.randn(32, 64),
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(40, 32),
    }
    saved.change_tensors(tmp_path / "full", lambda tensors: {**tensors, **dense})
    plan = saved.make_plan(tmp_path / "full", model)
    kept = apply_plan(tmp_path / "full", plan, tmp_path / "kept", mtp=choice)
    after = saved.read_all(tmp_path / "kept")
    assert all(torch.equal(after[key], value) for key, value in dense.items())
    assert (kept.mtp_tensors, kept.mtp_layers) == (2, {})
    report = apply_plan(tmp_path / "full", plan, tmp_path / "dropped")
    assert set(report.mtp_dropped) == set(dense)


def stacked(tensors: Tensors) -> Tensors:
    """The same with the eight experts of every layer stacked, as some publish them."""
    found = {key: value for key, value in tensors.items() if ".experts." not in key}
    for prefix in sorted({k.partition(".experts.")[0] for k in tensors.keys() - found.keys()}):
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.experts.{i}.{part}_proj.weight"] for i in range(8)])
            for part in ("gate", "up", "down")
        )
        found[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[f"{prefix}.experts.down_proj"] = down
    return found


def test_stored_per_expert_beside_stacked_layers(tmp_path: Path) -> None:
    """Qwen3.5 publishes stacked experts, and MTP layers as one matrix per expert."""
    full = tmp_path / "full"
    model = saved.save("qwen3_5_moe", full)
    saved.change_tensors(full, stacked)
    mtp = "mtp.layers.0.mlp."
    extra = {f"{mtp}gate.weight": torch.randn(8, 32)}
    for i in range(8):
        extra |= {f"{mtp}experts.{i}.{p}_proj.weight": torch.randn(24, 32) for p in ("gate", "up")}
        extra[f"{mtp}experts.{i}.down_proj.weight"] = torch.randn(32, 24)
    saved.change_tensors(full, lambda tensors: {**tensors, **extra})
    plan = saved.make_plan(full, model)
    last = list(plan.layers)[-1]
    report = apply_plan(full, plan, tmp_path / "out", mtp="prune")
    after = {k: v for k, v in saved.read_all(tmp_path / "out").items() if k.startswith("mtp.")}
    kept = plan.layers[last].kept
    assert report.mtp_layers == {"mtp.layers.0.mlp.experts": MtpLayer(8, kept, last)}
    assert len(after) == 1 + 3 * len(kept)
    assert torch.equal(after[f"{mtp}gate.weight"], extra[f"{mtp}gate.weight"][list(kept)])
    for new, old in enumerate(kept):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{part}.weight"
            found = after[f"{mtp}experts.{new}.{name}"]
            assert torch.equal(found, extra[f"{mtp}experts.{old}.{name}"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda key: key.replace("mlp.gate.", "mlp.chooser."), r"chooser.*no counterpart"),
        (lambda key: key.replace("mlp.experts.", "mlp.other_experts."), r"no counterpart"),
        (
            lambda key: "" if key.endswith("3.mlp.gate.weight") else key,
            r"without model\.layers\.3\.mlp\.gate\.weight",
        ),
    ],
    ids=["router", "experts", "no-router"],
)
def test_unknown_layouts_are_refused(
    full: Path, tmp_path: Path, change: Callable[[str], str], says: str
) -> None:
    """A router or experts under other names would be copied, and the checkpoint be wrong."""

    def renamed(tensors: Tensors) -> Tensors:
        names = {key: change(key) if key.startswith(MTP) else key for key in tensors}
        return {new: tensors[key] for key, new in names.items() if new}

    saved.change_tensors(full, renamed)
    with pytest.raises(UnsupportedModel, match=says + r".*`mtp='drop'`"):
        apply_plan(full, plan_for(full), tmp_path / "out", mtp="prune")
    assert not (tmp_path / "out").exists()


def test_missing_experts_are_refused(full: Path, tmp_path: Path) -> None:
    saved.change_tensors(
        full, lambda tensors: {k: v for k, v in tensors.items() if f"{LAYER}.5." not in k}
    )
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.5 is missing"):
        apply_plan(full, plan_for(full), tmp_path / "out", mtp="prune")


def test_unknown_choice_is_refused(full: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mtp is 'cut', a str; expected one of 'drop', 'prune'"):
        apply_plan(full, plan_for(full), tmp_path / "out", mtp="cut")  # type: ignore[arg-type]


def test_a_packed_router_is_cut_like_the_main_layers(tmp_path: Path) -> None:
    """The MTP layer's router by the same format, its experts renumbered in the settings too."""
    saved.save("glm4_moe", tmp_path / "full")
    codes = {layer: Codes.random(8, 32, 4, 16) for layer in ("1", "2", "3")}
    add_layer(tmp_path / "full", "model.layers.1.", MTP)

    def pack(tensors: Tensors) -> Tensors:
        found = dict(tensors)
        for layer, matrix in codes.items():
            del found[f"model.layers.{layer}.mlp.gate.weight"]
            for leaf, value in matrix.compressed(4).items():
                found[f"model.layers.{layer}.mlp.gate.{leaf}"] = value.clone()
        return found

    saved.change_tensors(tmp_path / "full", pack)
    kept = plan_for(tmp_path / "full").layers[LAST].kept
    gone = next(expert for expert in range(8) if expert not in kept)
    ignore = [f"{LAYER}.{kept[4]}.up_proj", f"{LAYER}.{gone}.up_proj"]
    settings = {"quant_method": "compressed-tensors", "ignore": ignore}
    saved.change_config(tmp_path / "full", num_nextn_predict_layers=1, quantization_config=settings)
    plan = plan_for(tmp_path / "full")
    apply_plan(tmp_path / "full", plan, tmp_path / "out", mtp="prune")
    after = saved.read_all(tmp_path / "out")
    for layer, matrix in codes.items():
        stem = f"model.layers.{layer}.mlp.gate."
        leaves = {key.removeprefix(stem): t for key, t in after.items() if key.startswith(stem)}
        like = "2" if layer == "3" else layer
        stays = plan.layers[f"model.layers.{like}.mlp.experts"].kept
        matrix.check_compressed(leaves, 4, list(stays))
    config = config_of(tmp_path / "out")
    assert config["quantization_config"]["ignore"] == [f"{LAYER}.4.up_proj"]
