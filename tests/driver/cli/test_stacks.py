"""Models with experts that text does not reach, on the command line: a talker's, vision experts."""

import json
from pathlib import Path

import pytest

import reap_driver as rd
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_kernels import SaliencyStats
from tests.driver.cli.conftest import Run, write_model

TALKER = [f"talker.model.layers.{n}.mlp.experts" for n in (0, 1)]
LENGTH = ("--seq-len", 32, "--device", "cpu")


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Qwen3-Omni: thinker, talker, vocoder."""
    folder = tmp_path_factory.mktemp("omni") / "model"
    return write_model(folder, "qwen3_omni_moe_whole")


@pytest.fixture(scope="module")
def thinker(omni: Path) -> list[str]:
    """Its MoE layers, whose names changed between versions of transformers."""
    layers = rd.find_moe_layers(meta_model(load_config(omni)))
    return [layer.name for layer in layers if layer.name.startswith("thinker.")]


@pytest.fixture(scope="module")
def ernie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ERNIE-4.5-VL: text and vision experts in every MoE layer, counted together."""
    folder = tmp_path_factory.mktemp("ernie") / "model"
    return write_model(folder, "ernie4_5_vl_moe")


def test_the_whole_omni_from_observation_to_checkpoint(
    run: Run, omni: Path, thinker: list[str], data: Path, tmp_path: Path
) -> None:
    """Resident and streamed alike; the talker is kept whole, and the plan says so."""
    found = []
    for stream in ("never", "always"):
        out = tmp_path / f"{stream}.safetensors"
        done = run("observe", omni, "--data", data, *LENGTH, "--stream", stream, "--out", out)
        assert done.code == 0, done.err
        found.append(SaliencyStats.load(out))
    for name, layer in found[0].layers.items():
        for key, value in layer.fields().items():
            assert value.equal(found[1].layers[name].fields()[key])
    assert list(found[0].layers) == thinker
    assert found[0].provenance["unobserved"] == TALKER
    assert list(found[0].provenance["stacks"].values()) == [thinker, TALKER]

    plan, out = tmp_path / "plan.json", tmp_path / "out"
    planned = run("plan", tmp_path / "never.safetensors", "--out", plan)
    assert planned.code == 0, planned.err
    note = "2 MoE layers were reached by no token and keep all experts: " + ", ".join(TALKER)
    assert note in planned.err
    compared = run("compare", omni, plan, "--data", data, *LENGTH)
    assert compared.code == 0, compared.err
    applied = run("apply", omni, plan, "--out", out, "--json")
    assert applied.code == 0, applied.err
    assert applied.json["whole"] == TALKER
    pruned = rd.load_model(out)
    counts = {layer.name: layer.num_experts for layer in rd.find_moe_layers(pruned)}
    assert counts == {**dict.fromkeys(thinker, 4), **dict.fromkeys(TALKER, 8)}
    streamed = ("--stream", "always", "--batch-size", 1)
    compared = run("compare", omni, out, "--data", data, *LENGTH, *streamed)
    assert compared.code == 0, compared.err
    reported = run("report", tmp_path / "never.safetensors", plan, "--out", tmp_path / "report")
    assert reported.code == 0, reported.err
    assert note in (tmp_path / "report" / "report.html").read_text()


def test_prune_does_it_all_at_once(
    run: Run, omni: Path, thinker: list[str], data: Path, tmp_path: Path
) -> None:
    done = run("prune", omni, "--data", data, *LENGTH, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    left = {name: after for name, (_, after) in done.json["experts_per_layer"].items()}
    assert left == {**dict.fromkeys(thinker, 4), **dict.fromkeys(TALKER, 8)}


def test_vision_experts_without_images(run: Run, ernie: Path, data: Path, tmp_path: Path) -> None:
    """They share their count with the text experts: the plan says what can be done, and it can."""
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    assert run("observe", ernie, "--data", data, *LENGTH, "--out", stats).code == 0
    refused = run("plan", stats, "--out", plan)
    assert refused.code == 3
    for part in ("vision_moe", "text_config.moe_num_experts counts them together", "--as-masks"):
        assert part in refused.error
    assert not plan.exists()

    ratios = tmp_path / "ratios.json"
    ratios.write_text(json.dumps({"*vision*": 0.25}))
    refused = run("plan", stats, "--out", plan, "--layer-ratios", ratios)
    assert "reached by no token" in refused.error
    assert "is to lose some (0.25)" in refused.error
    ratios.write_text(json.dumps({"*vision*": 0}))
    planned = run("plan", stats, "--out", plan, "--layer-ratios", ratios)
    assert planned.code == 0, planned.err
    assert "keep all experts" in planned.err
    refused = run("apply", ernie, plan, "--out", tmp_path / "out")
    assert "--as-masks" in refused.error
    masks = tmp_path / "masks.safetensors"
    assert run("apply", ernie, plan, "--as-masks", masks).code == 0
    assert len(rd.load_masks(masks)) == 2


def test_search_leaves_unreached_layers_whole(
    run: Run, ernie: Path, data: Path, tmp_path: Path
) -> None:
    stats, plan, ratios = (tmp_path / name for name in ("s.safetensors", "plan.json", "r.json"))
    assert run("observe", ernie, "--data", data, *LENGTH, "--out", stats).code == 0
    ratios.write_text(json.dumps({"*vision*": 0}))
    found = run(
        "search",
        ernie,
        stats,
        "--data",
        data,
        *LENGTH,
        "--layer-ratios",
        ratios,
        "--evaluations",
        4,
        "--population",
        2,
        "--elites",
        1,
        "--ratio",
        0.25,
        "--out",
        plan,
    )
    assert found.code == 0, found.err
    layers = json.loads(plan.read_text())["layers"]
    assert [name.split(".")[-2] for name in layers] == ["text_moe"] * 2
    assert sum(len(layer["removed"]) for layer in layers.values()) == 4
