"""`apply` and `prune` where layers keep different numbers of experts: refused, written when asked
for, or written as masks."""

from dataclasses import replace
from pathlib import Path

import pytest

import reap_driver as rd
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.writer.mask_file import load_masks
from tests.driver.cli.conftest import Run
from tests.driver.writer import saved

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


@pytest.fixture
def uneven(model: Path, tmp_path: Path) -> Path:
    """A plan that keeps 5 and 4 of 8 experts."""
    plan = saved.make_plan(model, meta_model(load_config(model)), saved.differing())
    replace(plan, allocation="global").save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_apply_refuses_and_names_the_ways(
    run: Run, model: Path, uneven: Path, tmp_path: Path
) -> None:
    done = run("apply", model, uneven, "--out", tmp_path / "out")
    assert done.code == 3
    for part in (FIRST, SECOND, "vLLM", "--non-uniform", "--as-masks", "--allocation uniform"):
        assert part in done.error
    assert not (tmp_path / "out").exists()


def test_apply_writes_it_when_asked(run: Run, model: Path, uneven: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("apply", model, uneven, "--out", out, "--non-uniform")
    assert done.code == 0
    assert "4 to 5 of 8 experts in each of 2 layers" in done.out
    assert "load_pruned.py" in done.err
    layers = {layer.name: layer.num_experts for layer in rd.find_moe_layers(rd.load_model(out))}
    assert layers == {FIRST: 5, SECOND: 4}
    again = run("apply", model, uneven, "--out", out, "--non-uniform", "--overwrite", "--json")
    assert again.json["experts_per_layer"] == {FIRST: [8, 5], SECOND: [8, 4]}
    assert "layers keep 4 to 5 experts" in again.json["warnings"][0]


def test_apply_writes_masks(run: Run, model: Path, uneven: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks.safetensors"
    done = run("apply", model, uneven, "--as-masks", masks, "--json")
    assert done.json["masks"] == str(masks)
    assert (done.json["layers"], done.json["kept"]) == (2, 9)
    assert load_masks(masks) == rd.Plan.load(uneven).kept
    assert "exists" in run("apply", model, uneven, "--as-masks", masks).error
    both = run("apply", model, uneven, "--as-masks", masks, "--out", tmp_path / "out")
    assert both.code == 2
    assert "not allowed with" in both.err


def test_prune_refuses_before_it_observes(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    ratios = tmp_path / "ratios.json"
    ratios.write_text('{"0": 0.25}')
    words = ("prune", model, "--data", data, "--seq-len", 64, "--layer-ratios", ratios)
    stats = tmp_path / "stats.safetensors"
    done = run(*words, "--out", tmp_path / "out", "--stats", stats)
    assert done.code == 3
    assert "--non-uniform" in done.error
    assert not stats.exists()
    done = run(*words, "--out", tmp_path / "out", "--non-uniform")
    assert done.code == 0, done.err
    layers = rd.find_moe_layers(rd.load_model(tmp_path / "out"))
    assert [layer.num_experts for layer in layers] == [6, 4]
