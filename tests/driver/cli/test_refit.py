"""`refit`: evaluated on what it did not fit, the better one written, every figure on record."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import reap_driver as rd
from reap_driver.load.streamed_model import StreamedModel
from reap_driver.refitting.engine import refit_layers
from reap_driver.workflow import refit as refitting
from reap_driver.workflow.refit_estimate import fitting
from reap_driver.workflow.refit_state import RefitState
from tests.driver.cli.conftest import Run, write_model
from tests.driver.writer import saved


@pytest.fixture(scope="module")
def cut(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the plain checkpoint's experts, calibrated on code."""
    folder = tmp_path_factory.mktemp("cut")
    lines = [json.dumps({"text": f"def add_{i}(a):\n    return a + {i}\n"}) for i in range(30)]
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n")
    rd.prune(originals["plain"], folder / "code.jsonl", 0.5, out=folder / "half", seq_len=16)
    return folder / "half"


@pytest.fixture
def words(originals: dict[str, Path], cut: Path, data: Path, tmp_path: Path) -> list[object]:
    """A command line that succeeds."""
    given = ["--original", originals["plain"], "--data", data, "--seq-len", 16]
    return ["refit", cut, *given, "--out", tmp_path / "out"]


def changed(old: Path, new: Path) -> list[str]:
    """Names of tensors with other bytes; all else is checked to be the same."""
    before, after = saved.read_all(old), saved.read_all(new)
    assert list(before) == list(after)
    shapes = [{name: (t.shape, t.dtype) for name, t in all_.items()} for all_ in (before, after)]
    assert shapes[0] == shapes[1]
    return [name for name in before if not saved.same_bytes(before[name], after[name])]


def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is solved becomes noise."""

    def noise(job: Any, *models: Any) -> Any:
        def put(name: str, down: torch.Tensor, *rest: Any) -> None:
            generator = torch.Generator().manual_seed(0)
            job.put(name, torch.randn(down.shape, generator=generator).to(down), *rest)

        return refit_layers(replace(job, put=put), *models)

    monkeypatch.setattr(refitting, "refit_layers", noise)


def test_the_figures_are_those_of_compare(
    run: Run, words: list[object], originals: dict[str, Path], cut: Path, data: Path
) -> None:
    """Evaluated in memory before anything is written, and compared afterwards."""
    other = data.with_name("other.jsonl")
    shutil.copy(data, other)
    found = run(*words, "--validate", other, "--keep-refit", "--json").json
    assert [one["pruned"] for one in found["comparisons"]] == ["the cut", "re-fitted"]
    compare = ["compare", originals["plain"], cut, words[-1], "--data", other, "--seq-len", 16]
    want = run(*compare, "--json").json
    for mine, theirs in zip(found["comparisons"], want["comparisons"], strict=True):
        assert mine["overall"] == theirs["overall"]
    assert found["refit"]["acceptance_gain"] == want["differences"][0]["acceptance"]
    assert all(one["not_calibrated_on"] == ["other"] for one in found["comparisons"])
    layers = found["refit"]["layers"]
    assert all(layer["error_after"] < layer["error_before"] for layer in layers.values())


def test_only_down_projections_change_and_all_is_on_record(
    run: Run, words: list[object], cut: Path, tmp_path: Path
) -> None:
    said = run(*words)
    assert said.code == 0, said.err
    out = tmp_path / "out"
    names = changed(cut, out)
    assert names
    assert all("down_proj" in name for name in names)
    assert not (tmp_path / "out.refit").exists()
    record = json.loads((out / "reap/refit.json").read_text())
    assert record["refit"]["written"] == "refit"
    plan = rd.Plan.load(cut / "reap/plan.json")
    for name, layer in record["refit"]["layers"].items():
        assert tuple(layer["experts"]) == plan.kept[name]
    card = (out / "README.md").read_text()
    assert "| all | re-fitted |" in card or "| code | re-fitted |" in card
    assert "which is better" in said.out
    lines = [line for line in said.out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    files = [cut / "reap" / name for name in ("stats.safetensors", "plan.json")]
    drawn = ["report", *files, "--compare", out / "reap/refit.json", "--out", tmp_path / "page"]
    assert run(*drawn).code == 0
    assert "re-fitted" in (tmp_path / "page/report.html").read_text()
    checked = run("compare", words[3], out, "--data", words[5], "--seq-len", 16, "--json").json
    assert checked["integrity"]["misplaced"] == []


def test_a_worse_re_fit_is_not_kept(
    run: Run, words: list[object], cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch)
    said = run(*words)
    assert said.code == 0, said.err
    assert "the cut as it was, since the re-fit is no better" in " ".join(said.out.split())
    assert changed(cut, tmp_path / "out") == []
    record = json.loads((tmp_path / "out/reap/refit.json").read_text())
    assert (record["refit"]["written"], record["refit"]["better"]) == ("cut", "cut")
    assert "did not follow the original more closely" in (tmp_path / "out/README.md").read_text()
    again = run(*words, "--overwrite", "--keep-refit")
    assert "as asked for, though it is no better" in " ".join(again.out.split())
    assert changed(cut, tmp_path / "out")


def test_groups_that_are_held_out_are_only_evaluated(
    run: Run, words: list[object], data: Path
) -> None:
    other = data.with_name("chat.jsonl")
    shutil.copy(data, other)
    found = run(*words, "--data", other, "--hold-out-group", "chat", "--json").json
    groups = found["comparisons"][0]["groups"]
    sequences = next(
        one["sequences"] for one in found["comparisons"][0]["data"] if one["group"] == "chat"
    )
    assert groups["chat"]["sequences"] == sequences // 8
    assert groups["code"]["sequences"] == sequences // 8
    assert found["comparisons"][1]["not_calibrated_on"] == ["chat"]
    assert next(iter(found["refit"]["layers"].values()))["fitted"] < 6 / 8 * 16 * sequences + 16


def test_dry_run_writes_nothing(run: Run, words: list[object], tmp_path: Path) -> None:
    said = run(*words, "--dry-run")
    assert said.code == 0, said.err
    assert max(map(len, said.out.splitlines())) <= 80
    for part in ("solving", "one pass through the original, 6 through", "to write"):
        assert part in " ".join(said.out.split())
    assert not list(tmp_path.glob("out*"))
    known = run(*words[:-2], "--dry-run", "--json").json
    assert known["passes"] == 6
    assert known["tokens"] > 0


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the first layer is solved."""
    put = RefitState.put

    def once(self: RefitState, name: str, down: torch.Tensor) -> None:
        monkeypatch.setattr(RefitState, "put", put)
        put(self, name, down)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RefitState, "put", once)


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of all files, but for the seconds that a run took."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = json.loads(found["reap/refit.json"])
    del record["refit"]["seconds"]
    return {**found, "reap/refit.json": json.dumps(record).encode()}


@pytest.mark.parametrize("states", ["device", "file"])
def test_an_interrupted_re_fit_goes_on_with_the_same_bits(
    run: Run, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: str
) -> None:
    def placed(*args: Any, **given: Any) -> Any:
        return replace(fitting(*args, **given), offload=states)

    monkeypatch.setattr(refitting, "fitting", placed)
    whole = [*words[:-1], tmp_path / "whole"]
    assert run(*whole).code == 0
    interrupted(monkeypatch)
    done = run(*words)
    assert done.code == 130
    assert "interrupted after 1 of 2 layers; the layers done are in" in done.error
    assert "run the same command with --resume to continue" in done.error
    assert not (tmp_path / "out").exists()
    assert "give --resume to go on from it" in run(*words).error
    other = run(*words, "--steps", 1, "--resume")
    assert other.code == 3
    assert "is of another run: steps was 2, now it is 1" in other.error
    matrices = tmp_path / "out.refit/matrices"
    matrices.rename(tmp_path / "aside")
    assert "done, whose matrices are not there" in run(*words, "--resume").error
    shutil.rmtree(matrices)
    (tmp_path / "aside").rename(matrices)
    state = next((tmp_path / "out.refit/states/0/pruned").rglob("*.safetensors"))
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{state.name} is damaged, or of another run" in run(*words, "--resume").error
    state.write_bytes(content)
    strange = tmp_path / "out.refit/notes.txt"
    strange.write_text("mine")
    assert "and holds 'notes.txt', which is no part of that" in run(*words, "--resume").error
    strange.unlink()
    (tmp_path / "out.refit/.state.json.0123abcd").write_text("{")  # of a write that was killed
    ran = []
    load = StreamedModel._load
    monkeypatch.setattr(
        StreamedModel, "_load", lambda self, layer: ran.append(layer) or load(self, layer)
    )
    assert run(*words, "--resume").code == 0
    assert ran[:2] == [1, 1], "of both models, the second layer"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.refit").exists()
    assert "nothing to resume" in run(*words, "--overwrite", "--resume").error
    again = run(*words, "--resume", "auto", "--json")
    assert again.json["complete"] is True
    assert "steps was 2" in run(*words, "--resume", "auto", "--steps", 1).error


def test_what_cannot_be_re_fitted(
    run: Run,
    words: list[object],
    originals: dict[str, Path],
    data: Path,
    tmp_path: Path,
) -> None:
    def error(*more: object, without: int = 0) -> tuple[int, str]:
        done = run(*words[: len(words) - without], *more)
        return done.code, done.error

    assert error(without=2)[0] == 2
    assert "--out is required" in error(without=2)[1]
    assert "--ridge -1: give a number above 0" in error("--ridge", -1)[1]
    assert (
        "--device-map auto: a re-fit goes through the models layer by layer"
        in (error("--device-map", "auto")[1])
    )
    code, text = error("--seq-len", 200)
    assert code == 3
    assert "too few to fit some, choose ridges by some and evaluate on others" in text
    assert "no source is in this group" in error("--hold-out-group", "x")[1]
    (tmp_path / "out").mkdir()
    assert "exists" in error()[1]
    (tmp_path / "out").rmdir()
    words[3] = words[1]
    assert "is the pruned checkpoint itself" in error()[1]
    words[3] = originals["plain"]
    words[1] = shutil.copytree(words[1], tmp_path / "packed")
    saved.change_config(words[1], quantization_config={"quant_method": "fp8"})
    code, text = error()
    assert code == 3
    assert "quantized" in text
    other = write_model(tmp_path / "other", "qwen3_moe", num_experts=4)
    words[1] = other
    code, text = error()
    assert code == 3
    assert "is not a cut of" in text
    words[1], words[3] = words[3], other
    assert "is not a cut of" in error()[1]
    assert not list(tmp_path.glob("out*"))
