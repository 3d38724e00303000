"""`compare` of plans that remove neurons: their matrices lie beside the file."""

import shutil
from pathlib import Path

import pytest
import torch

import reap_driver as rd
from reap_driver.workflow.errors import OptionError
from reap_kernels.errors import PlanError
from tests.driver.cli.conftest import Run


def write_plan(original: Path, path: Path, factor: float = 1) -> rd.Plan:
    """Every second expert with every second neuron; its matrices beside it."""
    model = rd.load_model(original)
    layers = rd.find_moe_layers(model)
    record = rd.record_of(model, layers)
    facts = {"layers": record["layers"]}
    folder = rd.Matrices.create(path.with_suffix(".matrices"), model=record["model"])
    planned = {}
    for layer in layers:
        kept = tuple(range(0, layer.num_experts, 2))
        ids = tuple(range(0, layer.intermediate_size, 2))
        planned[layer.name] = rd.LayerPlan.keeping(
            layer.num_experts, kept, layer.intermediate_size, (ids,) * len(kept)
        )
        down = layer.module.get_parameter("down_proj").detach()
        folder.put(layer.name, factor * down[list(kept)][:, :, list(ids)])
    about = {**record["model"], **facts}
    digest = {"digest": folder.digest}
    plan = rd.Plan(about, "obs", "uniform", 0.75, planned, "", matrices=digest)
    plan.save(path)
    return plan


@pytest.fixture
def plain(originals: dict[str, Path]) -> Path:
    return originals["plain"]


def test_a_width_plan_is_compared_with_its_matrices(
    run: Run, plain: Path, data: Path, tmp_path: Path
) -> None:
    write_plan(plain, tmp_path / "plan.json")
    write_plan(plain, tmp_path / "other.json", factor=5)
    words = [plain, "--data", data, "--seq-len", 32, "--json"]
    one = run("compare", *words[:1], tmp_path / "plan.json", *words[1:]).json
    assert 0.5 < one["overall"]["acceptance"]["value"] < 1
    both = run("compare", plain, tmp_path / "plan.json", tmp_path / "other.json", *words[1:]).json[
        "comparisons"
    ]
    assert both[0]["overall"] == one["overall"]
    assert both[1]["overall"]["kl"]["value"] > one["overall"]["kl"]["value"]
    found = rd.compare(plain, tmp_path / "plan.json", data, seq_len=32)
    assert found.comparison.overall.kl.value == one["overall"]["kl"]["value"]
    with torch.no_grad():  # the same by hand
        model = rd.load_model(plain)
        batch = {"input_ids": torch.arange(3, 35)[None]}
        plan = rd.Plan.load(tmp_path / "plan.json")
        figures = rd.compare_models(
            model, plan, [batch], matrices=tmp_path / "plan.matrices"
        ).overall
        whole = rd.LayerPlan.keeping
        wide = {n: whole(la.num_experts, la.kept) for n, la in plan.layers.items()}
        masked = rd.compare_models(model, rd.Plan({}, "x", "x", 0.5, wide, ""), [batch]).overall
    assert figures.kl.value > masked.kl.value > 0


def test_matrices_that_are_missing_or_of_another_plan(
    run: Run, plain: Path, data: Path, tmp_path: Path
) -> None:
    plan = write_plan(plain, tmp_path / "plan.json")
    write_plan(plain, tmp_path / "other.json", factor=5)
    words = ["compare", plain, tmp_path / "plan.json", "--data", data, "--seq-len", 32]
    (tmp_path / "plan.matrices").rename(tmp_path / "aside")
    missing = run(*words)
    assert missing.code == 3
    assert "plan.matrices is no folder of them" in missing.error
    shutil.copytree(tmp_path / "other.matrices", tmp_path / "plan.matrices")
    assert "the plan goes with matrices of sha256:" in run(*words).error
    with pytest.raises(PlanError, match="keep their folder beside the plan's file"):
        rd.compare(plain, plan, data, seq_len=32)
    with pytest.raises(OptionError, match="give a checkpoint"):
        rd.compare(plain, 3, data, seq_len=32)


def test_a_checkpoint_of_a_width_plan_is_checked(
    run: Run, plain: Path, data: Path, tmp_path: Path
) -> None:
    """Its plan accounts for all that differs from the original, and says what was solved again."""
    plan = write_plan(plain, tmp_path / "plan.json")
    out = tmp_path / "narrow"
    assert run("apply", plain, tmp_path / "plan.json", "--out", out).code == 0
    words = ["compare", plain, out, "--data", data, "--seq-len", 32]
    found = run(*words, "--json").json["integrity"]
    assert (found["misplaced"], found["solved_again"]) == ([], list(plan.layers))
    said = " ".join(run(*words).out.split())
    assert "all in the plan's order; down projections of 2 layers were solved again" in said
