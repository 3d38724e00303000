"""`--mtp`: what a dry run says of multi-token-prediction layers, and what a run does with them."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch

import reap_driver as rd
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.load.streamed_model import StreamedModel
from reap_driver.planning.plan import Plan
from reap_kernels import SaliencyStats
from reap_kernels.errors import PlanError
from tests.driver.cli.conftest import Run, write_model
from tests.driver.observation.test_mtp import own_tensors
from tests.driver.writer import saved
from tests.driver.writer.test_mtp import add_layer

MTP = "model.layers.3."
LAYER = f"{MTP}mlp.experts"


def write_mtp(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    """GLM-4.5 shape, its fourth layer for multi-token prediction."""
    write_model(folder, "glm4_moe")
    tensors = saved.read_all(folder)
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    torch.manual_seed(0)
    saved.write_all(folder, tensors)
    add_layer(folder, "model.layers.1.", MTP, extra)
    saved.change_config(folder, num_nextn_predict_layers=1)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a layer that cannot be run: it has no norms of its own."""
    folder = tmp_path_factory.mktemp("mtp") / "model"
    return write_mtp(folder, {f"{MTP}eh_proj.weight": torch.randn(32, 64)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a layer that can be run."""
    return write_mtp(tmp_path_factory.mktemp("mtp") / "whole", own_tensors())


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
    assert f"{LAYER} (multi-token prediction): not observed" in done.err
    assert "are not observed: the checkpoint has no tensor" in done.err


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


@pytest.mark.parametrize("stream", ["never", "always"])
def test_prune_observes_the_layer_and_prunes_it_by_its_own_scores(
    run: Run, whole: Path, data: Path, tmp_path: Path, stream: str
) -> None:
    out = tmp_path / "out"
    words = ["prune", whole, "--data", data, "--ratio", 0.25, "--seq-len", 16, "--stream", stream]
    done = run(*words, "--mtp", "prune", "--out", out)
    assert done.code == 0, done.err
    assert "not observed" not in done.err
    foreseen = run(*words, "--mtp", "prune", "--dry-run", "--json").json["model"]
    assert foreseen["layers"] == run(*words, "--dry-run", "--json").json["model"]["layers"] + 1
    plan = Plan.load(out / "reap/plan.json")
    kept = plan.layers[LAYER].kept
    assert kept != plan.layers["model.layers.2.mlp.experts"].kept
    assert not [note for note in plan.notes if "multi-token" in note]
    stats = SaliencyStats.load(out / "reap/stats.safetensors")
    assert kept == rd.make_plan(rd.score(stats), ratio=0.25).layers[LAYER].kept
    before, after = saved.read_all(whole), saved.read_all(out)
    gate = f"{MTP}mlp.gate.weight"
    assert torch.equal(after[gate], before[gate][list(kept)])
    for new, old in enumerate(kept):
        name = "down_proj.weight"
        assert torch.equal(after[f"{LAYER}.{new}.{name}"], before[f"{LAYER}.{old}.{name}"])
    again = run(*words, "--mtp", "prune", "--out", out, "--resume", "auto")
    assert again.code == 0
    assert "complete" in again.out + again.err
    dropped = run(*words, "--out", out, "--resume", "auto")
    assert dropped.code == 3
    assert "mtp" in dropped.error


def test_observed_planned_and_applied_step_by_step(
    run: Run, whole: Path, data: Path, tmp_path: Path
) -> None:
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    words = ["observe", whole, "--data", data, "--seq-len", 16, "--out", stats]
    assert run(*words, "--with-mtp").code == 0
    assert list(SaliencyStats.load(stats).layers)[-1] == LAYER
    assert run("plan", stats, "--ratio", 0.25, "--out", plan).code == 0
    for choice, tensors in (("prune", True), ("drop", False)):
        out = tmp_path / choice
        done = run("apply", whole, plan, "--mtp", choice, "--out", out)
        assert done.code == 0, done.err
        assert any(key.startswith(MTP) for key in saved.read_all(out)) == tensors
    refused = run("apply", whole, plan, "--mtp", "keep", "--out", tmp_path / "keep")
    assert "removes 2 experts" in refused.error
    assert "give --mtp prune" in refused.error


def test_an_interrupted_run_goes_on_to_the_same_bits(
    run: Run, whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last main layer, whose states the layer is given."""
    words = ["observe", whole, "--data", data, "--seq-len", 16, "--stream", "always", "--with-mtp"]
    words += ["--journal-every", 1, "--out"]
    assert run(*words, tmp_path / "at_once").code == 0
    release = StreamedModel.release

    def stop(self: StreamedModel, layer: int) -> None:
        release(self, layer)
        if layer == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(StreamedModel, "release", stop)
        ended = run(*words, tmp_path / "stats")
    assert ended.code == 130
    assert "interrupted after 3 of 4 layers" in ended.error
    other = [word for word in words if word != "--with-mtp"]
    assert "with_mtp" in run(*other, tmp_path / "stats", "--resume").error
    assert run(*words, tmp_path / "stats", "--resume").code == 0
    found = [SaliencyStats.load(tmp_path / name).layers for name in ("at_once", "stats")]
    assert list(found[0]) == list(found[1])
    for name, layer in found[0].items():
        assert torch.equal(layer.count, found[1][name].count)
        assert torch.equal(layer.weighted_norm_sum, found[1][name].weighted_norm_sum)


def test_what_evaluates_the_model_leaves_the_layer_out(
    run: Run, whole: Path, data: Path, tmp_path: Path
) -> None:
    """`compare` and masks know such a plan; a search is refused its statistics."""
    out, given = tmp_path / "out", ["--data", data, "--seq-len", 16]
    assert run("prune", whole, *given, "--ratio", 0.25, "--mtp", "prune", "--out", out).code == 0
    plan, stats = out / "reap/plan.json", out / "reap/stats.safetensors"
    done = run("compare", whole, out, *given, "--sequences", 4)
    assert done.code == 0, done.err
    masks = tmp_path / "masks.safetensors"
    assert run("apply", whole, plan, "--as-masks", masks).code == 0
    assert list(rd.load_masks(masks)) == [
        "model.layers.1.mlp.experts",
        "model.layers.2.mlp.experts",
    ]
    scores = rd.score(SaliencyStats.load(stats))
    with pytest.raises(PlanError, match=r"3.* multi-token prediction.*`with_mtp=True`"):
        rd.search_plan(rd.load_model(whole), scores, [{}], ratio=0.25)
    deeper = json.loads(plan.read_text())
    deeper["layers"]["model.layers.4.mlp.experts"] = deeper["layers"][LAYER]
    plan.write_text(json.dumps(deeper))
    assert "does not exist in this model" in run("compare", whole, plan, *given).error


@pytest.mark.parametrize("named", [True, False])
def test_other_tools_are_told_of_the_layers_that_the_model_has(
    named: bool, run: Run, whole: Path, data: Path, tmp_path: Path
) -> None:
    of_model = ("--model", whole) if named else ()
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    words = ["observe", whole, "--data", data, "--seq-len", 16, "--out", stats, "--with-mtp"]
    assert run(*words).code == 0
    assert run("plan", stats, "--ratio", 0.25, "--out", plan).code == 0
    blocks = {"model.layers.1.mlp", "model.layers.2.mlp"}
    report, bits = tmp_path / "report.json", tmp_path / "bits.json"
    told = ["convert", plan, *of_model, "--to", "llm-compressor", "--out", report]
    assert run(*told).code == 0
    assert json.loads(report.read_text()).keys() == blocks
    told = ["convert", stats, "--plan", plan, *of_model, "--to", "auto-round", "--bits", 3]
    assert run(*told, "--out", bits).code == 0
    found = json.loads(bits.read_text())
    assert {name.partition(".experts")[0] for name in found} == blocks
    assert len(found) == 2 * 6


def test_that_it_is_the_last_layer_is_foreseen(
    run: Run, whole: Path, data: Path, tmp_path: Path
) -> None:
    """Before anything is observed, by a dry run too."""
    words = ["prune", whole, "--data", data, "--seq-len", 16, "--ratio", 0.25, "--skip-last", 1]
    for more in (["--dry-run"], ["--out", tmp_path / "out"]):
        done = run(*words, "--mtp", "prune", *more)
        assert done.code == 3
        assert f"{LAYER!r} keeps 8; n_routed_experts of config.json counts both" in done.error
        assert "with --skip-last, it is the last layer" in done.error
        assert "observed" not in done.out
    assert "layers.2.mlp.experts' keeps 8" in run(*words, "--dry-run").error


def test_a_size_that_cannot_be_reached_tells_what_is_in_no_expert(
    run: Run, whole: Path, data: Path, tmp_path: Path
) -> None:
    said = run("prune", whole, "--data", data, "--target-size", "200kB", "--out", tmp_path / "out")
    tensors = open_checkpoint(whole).tensors
    routed = (MTP, ".mlp.experts.", ".mlp.gate.")
    rest = sum(one.nbytes for key, one in tensors.items() if not any(w in key for w in routed))
    found = re.search(r"of which (\d+) kB are in no routed expert", said.error)
    assert found is not None, said.error
    assert int(found[1]) == pytest.approx(rest / 1000, rel=0.1)  # headers of files count, too


def test_observe_refuses_what_cannot_be_run(
    run: Run, model: Path, whole: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--data", data, "--seq-len", 16, "--out", tmp_path / "stats.safetensors"]
    words.append("--with-mtp")
    said = run("observe", model, *words).error
    assert "cannot be observed: the checkpoint has no tensor" in said
    for more in (["--gram", tmp_path / "gram"], ["--device-map", "auto"]):
        assert "not together with" in run("observe", whole, *words, *more).error
    assert not list(tmp_path.glob("stats*"))
    prune = ["prune", whole, "--data", data, "--ratio", 0.25, "--out", tmp_path / "out"]
    for more in (["--with-mtp"], ["--gram", tmp_path / "gram"]):
        done = run(*prune, *more)
        assert done.code == 2
        assert f"{more[0]}: only with --dry-run" in done.error
    assert "--mtp prune" in run(*prune, "--with-mtp").error
