"""`apply --refit`: what apply and then refit do, in one command that can be interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import reap_driver as rd
from reap_kernels.errors import UnsupportedModel
from tests.driver.cli.conftest import Run
from tests.driver.cli.test_prune_refit import check_two_ranks, same
from tests.driver.cli.test_refit import interrupted


@pytest.fixture(scope="module")
def plan(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    model = rd.load_model(str(originals["plain"]), device="cpu")
    with rd.observe(model) as obs:
        obs(input_ids=torch.arange(64).view(2, 32))
    rd.make_plan(rd.score(obs.stats), 0.5).save(path)
    return path


@pytest.fixture
def words(originals: dict[str, Path], plan: Path, data: Path, tmp_path: Path) -> list[object]:
    given = ["--data", data, "--seq-len", 16, "--force-model"]
    return ["apply", originals["plain"], plan, "--refit", *given, "--out", tmp_path / "out"]


def test_it_is_apply_and_refit(
    originals: dict[str, Path], plan: Path, data: Path, tmp_path: Path
) -> None:
    model, how = originals["plain"], {"data": data, "seq_len": 16}
    found = rd.apply(model, plan, out=tmp_path / "out", force_model=True, refit=True, **how)
    assert isinstance(found, rd.Applied)
    assert found.refitted is not None
    rd.apply(model, plan, out=tmp_path / "half", force_model=True)
    want = rd.refit(tmp_path / "half", model, out=tmp_path / "refit", **how)
    assert isinstance(want, rd.Refitted)
    assert same(tmp_path / "out", tmp_path / "refit")
    assert found.out == tmp_path / "out"
    facts = found.facts()
    assert facts["refitted"]["comparisons"] == want.facts()["comparisons"]
    assert facts["refitted"]["refit"]["written"] == "refit"
    assert found.refitted.describe() in found.describe()
    assert not list(tmp_path.glob("out.*"))
    assert "\n# out\n" in (tmp_path / "out/README.md").read_text(), "the card has its name"


def test_interrupted_between_and_complete(
    run: Run, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*words[:-1], tmp_path / "whole").code == 0
    none = run(*words, "--resume")
    assert none.code == 3
    assert "out.cut/out: is not there" in none.error
    interrupted(monkeypatch)
    stopped = run(*words)
    assert stopped.code == 130
    assert f"the cut is complete, in {tmp_path}/out.cut/out; --resume goes on" in stopped.err
    assert (tmp_path / "out.refit/state.json").is_file()
    assert "out.cut/out: exists" in run(*words).error
    done = run(*words, "--resume", "--json")
    assert done.code == 0, done.err
    assert done.json["refitted"]["refit"]["written"] == "refit"
    assert same(tmp_path / "out", tmp_path / "whole")
    assert not list(tmp_path.glob("out.*"))
    assert "out: exists" in run(*words, "--resume").error
    assert run(*words, "--resume", "auto", "--json").json["complete"] is True
    other = run(*words, "--resume", "auto", "--seed", 1)
    assert other.code == 3
    assert "was made by another command" in other.error


def test_two_ranks(words: list[object], tmp_path: Path) -> None:
    check_two_ranks(words, tmp_path)


def test_refused(run: Run, words: list[object], tmp_path: Path) -> None:
    place = words.index("--data")
    bare = [*words[:place], *words[place + 2 :]]
    assert "no data to run the model on; give --data" in run(*bare).error
    assert "not together with --refit" in run(*words, "--device-map", "auto").error
    masks = [*words[:-2], "--as-masks", tmp_path / "masks"]
    assert "--refit: changes experts, which masks cannot; give --out" in run(*masks).error
    plain = [word for word in words if word != "--refit"]
    only = run(*plain)
    assert only.code == 2
    assert f"--data {words[place + 1]}: only with --refit" in only.error
    assert not (tmp_path / "out").exists()


def test_refused_before_the_cut(
    run: Run, words: list[object], originals: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(originals["plain"], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    (model / "config.json").write_text(json.dumps(config))
    done = run("apply", model, *words[2:])
    assert done.code == UnsupportedModel("").exit_code, done.err
    assert "is quantized" in done.error
    lacking = run("apply", originals["plain"], tmp_path / "none.json", *words[3:])
    assert lacking.code != 0
    assert not list(tmp_path.glob("out*"))
