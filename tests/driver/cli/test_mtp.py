"""`--mtp`: what a dry run says of multi-token-prediction layers, and what a run does with them."""

from pathlib import Path

import pytest
import torch

from reap_driver.files.checkpoint import open_checkpoint
from tests.driver.cli.conftest import Run, write_model
from tests.driver.writer import saved
from tests.driver.writer.test_mtp import add_layer

MTP = "model.layers.3."
LAYER = f"{MTP}mlp.experts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-4.5 shape, its fourth layer for multi-token prediction."""
    folder = write_model(tmp_path_factory.mktemp("mtp") / "model", "glm4_moe")
    tensors = saved.read_all(folder)
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    torch.manual_seed(0)
    saved.write_all(folder, tensors)
    add_layer(folder, "model.layers.1.", MTP, {f"{MTP}eh_proj.weight": torch.randn(32, 64)})
    saved.change_config(folder, num_nextn_predict_layers=1)
    return folder


def mtp_bytes(folder: Path) -> int:
    """Bytes of the MTP layer's tensors."""
    tensors = open_checkpoint(folder).tensors
    return sum(entry.nbytes for key, entry in tensors.items() if key.startswith(MTP))


def test_a_dry_run_says_what_becomes_of_them(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    words = ["prune", model, "--data", data, "--ratio", 0.25, "--seq-len", 16, "--dry-run"]
    before = mtp_bytes(model)
    dropped = run(*words)
    assert "of which multi-token-prediction layers" in dropped.out, dropped.out
    assert "kB -> none" in dropped.out
    assert run(*words, "--json").json["pruned"]["mtp_bytes"] == [before, 0]
    foreseen = run(*words, "--mtp", "prune", "--json").json["pruned"]
    assert foreseen["mtp_bytes"][0] == before
    kept = run(*words, "--mtp", "keep")
    assert kept.code == 3
    assert "cannot keep all 8 experts while the other layers keep 6" in kept.error
    assert "give --mtp prune, or --mtp drop and let the engine draft" in kept.error

    out = tmp_path / "out"
    done = run(*words[:-1], "--mtp", "prune", "--out", out)
    assert done.code == 0, done.err
    assert mtp_bytes(out) == foreseen["mtp_bytes"][1]
    assert "kept multi-token-prediction layers" in done.out
    assert "6 of 8 experts in each" in done.out
    assert f"{LAYER} (multi-token prediction): not observed" in done.out + done.err


def test_a_re_fit_leaves_them_as_they_were_cut(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    given = ["--data", data, "--seq-len", 16, "--json"]
    cut, fit = tmp_path / "cut", tmp_path / "fit"
    done = run("prune", model, *given, "--ratio", 0.25, "--mtp", "prune", "--out", cut).json
    assert done["mtp_layers"] == {
        LAYER: {"experts": [8, 6], "kept_like": "model.layers.2.mlp.experts"}
    }
    words = ["refit", cut, "--original", model, *given, "--keep-refit", "--out", fit]
    assert run(*words).code == 0
    before, after = saved.read_all(cut), saved.read_all(fit)
    assert before.keys() == after.keys()
    changed = {key for key in before if not saved.same_bytes(before[key], after[key])}
    assert changed
    assert not [key for key in changed if key.startswith(MTP)]
