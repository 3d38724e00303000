"""`prune --refit`: what prune and then refit do, in one command that can be interrupted."""

import json
from pathlib import Path

import pytest

import reap_driver as rd
from tests.driver.cli.conftest import Run
from tests.driver.cli.test_refit import interrupted
from tests.driver.distributed.launch import ranked
from tests.driver.writer import saved


@pytest.fixture
def words(originals: dict[str, Path], data: Path, tmp_path: Path) -> list[object]:
    given = ["--data", data, "--seq-len", 16]
    return ["prune", originals["plain"], *given, "--refit", "--out", tmp_path / "out"]


def same(one: Path, other: Path) -> bool:
    before, after = saved.read_all(one), saved.read_all(other)
    return list(before) == list(after) and all(
        saved.same_bytes(before[name], after[name]) for name in before
    )


def check_two_ranks(words: list[object], tmp_path: Path) -> None:
    """That a command with a re-fit writes tmp_path/out on two ranks, and nothing else."""
    from reap_driver.cli.main import main

    ended = ranked(2, lambda: main([*map(str, words), "--json", "--quiet"]))
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["refitted"]["refit"]["written"] in ("refit", "cut")
    assert (tmp_path / "out/reap/refit.json").is_file()
    assert not list(tmp_path.glob("out.*"))


def test_it_is_prune_and_refit(
    run: Run, words: list[object], originals: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    found = run(*words, "--json").json
    half = tmp_path / "half"
    given = ["--data", data, "--seq-len", 16]
    assert run("prune", originals["plain"], *given, "--out", half).code == 0
    words_of_refit = ["refit", half, "--original", originals["plain"], *given]
    want = run(*words_of_refit, "--out", tmp_path / "refit", "--json").json
    assert same(tmp_path / "out", tmp_path / "refit")
    assert found["refitted"]["comparisons"] == want["comparisons"]
    assert found["refitted"]["refit"]["written"] == "refit"
    assert found["out"] == str(tmp_path / "out")
    assert not list(tmp_path.glob("out.*"))
    assert (
        rd.Plan.load(tmp_path / "out/reap/plan.json").kept
        == rd.Plan.load(half / "reap/plan.json").kept
    )
    assert "\n# out\n" in (tmp_path / "out/README.md").read_text(), "the card has its name"


def test_interrupted_between_and_complete(
    run: Run, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [*words[:-1], tmp_path / "whole"]
    assert run(*whole).code == 0
    interrupted(monkeypatch)
    assert run(*words).code == 130
    assert (tmp_path / "out.cut/out/config.json").is_file()
    assert "out.cut/out: exists" in run(*words).error
    done = run(*words, "--resume", "--json")
    assert done.code == 0, done.err
    assert done.json["refit"]["written"] == "refit"
    assert same(tmp_path / "out", tmp_path / "whole")
    assert not list(tmp_path.glob("out.*"))
    assert run(*words, "--resume", "auto", "--json").json["complete"] is True
    other = run(*words, "--resume", "auto", "--ratio", 0.25)
    assert other.code == 3
    assert "was made by another command" in other.error
    plain = [word for word in words if word != "--refit"]
    assert "refit was True" in run(*plain, "--resume", "auto").error
    again = run(*words, "--resume", "auto", "--ratio", 0.25, "--overwrite")
    assert again.code == 0, again.err
    kept = rd.Plan.load(tmp_path / "out/reap/plan.json").kept.values()
    assert {len(ids) for ids in kept} == {6}


def test_two_ranks(words: list[object], tmp_path: Path) -> None:
    check_two_ranks(words, tmp_path)


def test_refused(run: Run, words: list[object], tmp_path: Path) -> None:
    done = run(*words, "--dry-run")
    assert done.code == 2
    assert "--refit: not with --dry-run; the command refit estimates that part" in done.error
    assert "not together with --refit" in run(*words, "--device-map", "auto").error
    few = run(*words[:-2], "--seq-len", 200, "--out", tmp_path / "few")
    assert few.code == 3
    assert "too few to fit some" in few.error
    assert f"the cut is complete, in {tmp_path}/few.cut/few" in few.err
