"""`reap-kernels report`: files, JSON, refusals."""

from pathlib import Path

import pytest

from reap_driver.cli import main
from tests.driver.cli.conftest import Run, run  # noqa: F401
from tests.driver.report.conftest import Make


@pytest.fixture
def files(make: Make, tmp_path: Path) -> tuple[Path, Path]:
    """Statistics and a plan, saved."""
    stats, plan = make()
    stats.save(tmp_path / "stats.safetensors")
    plan.save(tmp_path / "plan.json")
    return tmp_path / "stats.safetensors", tmp_path / "plan.json"


def test_writes_a_page_and_pictures(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "report"
    done = run("report", *files, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["out"] == str(out)
    assert {Path(name) for name in done.json["files"]} == set(out.iterdir())
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_replaces_only_when_told(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "report"
    assert run("report", *files, "--out", out, "-q").code == 0
    (out / "report.html").write_text("mine")
    refused = run("report", *files, "--out", out)
    assert refused.code == 3
    assert "report.html: exists; choose another folder, or pass --overwrite" in refused.error
    assert (out / "report.html").read_text() == "mine"
    (out / "notes.txt").write_text("kept")
    assert run("report", *files, "--out", out, "--overwrite").code == 0
    assert (out / "report.html").read_text(encoding="utf-8") != "mine"
    assert (out / "notes.txt").read_text() == "kept"


def test_refuses_what_it_cannot_write_or_read(
    run: Run,  # noqa: F811
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    stats, plan = files
    assert "is a file; give the name of a folder" in run("report", *files, "--out", stats).error
    missing = tmp_path / "no" / "such"
    assert "does not exist; make it first" in run("report", *files, "--out", missing).error
    wrong = run("report", plan, "--out", tmp_path / "out")
    assert wrong.code == 3
    assert "cannot be read" in wrong.error
    assert not (tmp_path / "out").exists()
    unknown = run("report", *files, "--criterion", "best", "--out", tmp_path / "out")
    assert "criterion 'best' is unknown" in unknown.error


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "reap-kernels report stats.safetensors plan.json --out report" in capsys.readouterr().out
