"""`reap-kernels report`: the files it writes, its JSON, and its refusals."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reap_driver.cli.main import main
from reap_driver.planning.plan import Plan
from reap_driver.reporting.comparison import read_comparison
from reap_driver.workflow.console import Console
from reap_kernels.errors import DataError
from tests.driver.cli.conftest import Run, run, write_model  # noqa: F401
from tests.driver.reporting.conftest import Make


@pytest.fixture
def files(make: Make, tmp_path: Path) -> tuple[Path, Path]:
    """Statistics and a plan, saved."""
    stats, plan = make()
    stats.save(tmp_path / "stats.safetensors")
    plan.save(tmp_path / "plan.json")
    return tmp_path / "stats.safetensors", tmp_path / "plan.json"


def test_writes_a_page_and_pictures(
    run: Run,  # noqa: F811
    files: tuple[Path, Path],
    report: Path,
    tmp_path: Path,
) -> None:
    """Equal input gives equal bytes: those that `write_report` wrote of the same statistics."""
    out = tmp_path / "report"
    done = run("report", *files, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["out"] == str(out)
    assert {Path(name) for name in done.json["files"]} == set(out.iterdir())
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {path.name for path in report.iterdir()}
    for path in report.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_matplotlib_is_imported_only_to_draw(tmp_path: Path) -> None:
    """Neither `plan` and `apply` nor the modules of the report and the demo import it."""
    import reap_driver as rd

    root = Path(__file__).parents[3]
    folder = write_model(tmp_path / "model", "qwen3_moe")
    with rd.observe(rd.load_model(folder)) as obs:
        obs(input_ids=torch.arange(3, 67).reshape(2, 32))
    obs.stats.save(tmp_path / "stats.safetensors")
    script = """
import sys
from reap_driver.cli.main import main
import reap_driver.demo.run, reap_driver.reporting.page
assert main(["plan", "stats.safetensors", "--ratio", "0.25", "--out", "plan.json"]) == 0
assert main(["apply", "model", "plan.json", "--out", "pruned"]) == 0
assert "matplotlib" not in sys.modules
import reap_driver.reporting.pictures
assert "matplotlib" in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_replaces_only_when_told(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "report"
    out.mkdir()
    (out / "report.html").write_text("mine")
    refused = run("report", *files, "--out", out)
    assert refused.code == 3
    assert "report.html: exists; choose another folder, or pass --overwrite" in refused.error
    assert (out / "report.html").read_text() == "mine"
    (out / "notes.txt").write_text("kept")
    assert run("report", files[0], "--out", out, "--overwrite").code == 0
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


def figures(value: float) -> dict[str, object]:
    """Figures as `compare` prints them, all with different values."""
    return {
        "sequences": 3,
        "predictions": 1234,
        **{
            name: {"value": value + n, "low": value + n - 0.25, "high": value + n + 0.5}
            for n, name in enumerate(
                ("original_perplexity", "pruned_perplexity", "perplexity_ratio", "kl")
            )
        },
        "acceptance": {"value": None, "low": None, "high": None},
        "same_top": {"value": 0.5, "low": None, "high": None},
    }


def compared(path: Path, **changes: object) -> Path:
    """Writes a file like those of `compare --json`."""
    content = {
        "command": "compare",
        "format": "reap-comparison",
        "version": 1,
        "original": "/home/me/big",
        "pruned": "acme/small",
        "confidence": 0.95,
        "overall": figures(10),
        "groups": {"code": figures(20), "a<b": figures(30)},
        "integrity": {"orphan_rate": 0.125},
        **changes,
    }
    path.write_text(json.dumps(content))
    return path


def test_shows_a_comparison(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    comparison = compared(tmp_path / "compare.json")
    words = ("report", files[0], "--compare", comparison, "--out", tmp_path / "report")
    assert run(*words).code == 0
    source = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    [table] = re.findall(r"<table><caption><span>big and acme/small.*?</table>", source, re.DOTALL)
    assert '<th scope="col">a&lt;b</th>' in table
    rows = re.findall(r'<th scope="row".*?>(.*?)</th>(.*?)</tr>', table)
    cells = {name: re.findall(r"<td.*?>(.*?)</td>", rest) for name, rest in rows}
    assert cells["perplexity, pruned"] == [
        "21.00 [20.75, 21.50]",
        "31.00 [30.75, 31.50]",
        "11.00 [10.75, 11.50]",
    ]
    assert cells["expected acceptance"] == ["-", "-", "-"]
    assert cells["same top token"] == ["0.5000", "0.5000", "0.5000"]
    assert cells["predictions"] == ["1,234"] * 3
    assert "12.5\u00a0%" in source
    assert "/home/me" not in source


def test_shows_a_comparison_of_several(
    run: Run,  # noqa: F811
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """A row for each, and the caption says what they are; a damaged entry is named."""
    one = json.loads(compared(tmp_path / "one.json").read_text())
    other = {**one, "pruned": "/home/me/few.json", "overall": figures(2000)}
    content = {
        "format": "reap-comparisons",
        "version": 1,
        "original": "/home/me/big",
        "comparisons": [one, other],
    }
    path = tmp_path / "several.json"
    path.write_text(json.dumps(content))
    assert run("report", files[0], "--compare", path, "--out", tmp_path / "report").code == 0
    source = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    [table] = re.findall(r"<table><caption><span>2 pruned models.*?</table>", source, re.DOTALL)
    assert "each compared with big (perplexity 10.00 [9.750, 10.50])" in table
    rows = dict(re.findall(r'<th scope="row".*?>(.*?)</th>(.*?)</tr>', table))
    assert list(rows) == ["acme/small", "few.json"]
    assert "2001 [2001, 2002]" in rows["few.json"]
    assert "12.5\u00a0%" in rows["acme/small"]
    assert "/home/me" not in source
    path.write_text(json.dumps({**content, "comparisons": [one, {**other, "confidence": 95}]}))
    done = run("report", files[0], "--compare", path, "--out", tmp_path / "out")
    assert "field 'comparisons[1].confidence' is 95" in done.error


def test_refuses_what_is_no_comparison(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for path, message in (
        (tmp_path / "missing.json", "cannot be read"),
        (broken, "is not JSON"),
        (compared(tmp_path / "other.json", format=None), "is not a comparison"),
    ):
        done = run("report", files[0], "--compare", path, "--out", tmp_path / "out")
        assert done.code == 3
        assert message in done.error
        assert "give the output of `reap-kernels compare ... --json`" in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"groups": None}, "field 'groups' is None"),
        ({"groups": {}}, "field 'groups' has 0 entries"),
        ({"overall": None}, "field 'overall' is None"),
        ({"confidence": {}}, "field 'confidence' is {}"),
        ({"confidence": 95}, "field 'confidence' is 95"),
        ({"original": 3}, "field 'original' is 3"),
        ({"integrity": [1]}, r"field 'integrity' is \[1\]"),
        ({"integrity": {"orphan_rate": "x"}}, "field 'integrity.orphan_rate' is 'x'"),
        ({"overall": {**figures(1), "kl": 0.5}}, "field 'overall.kl' is 0.5"),
        ({"overall": {**figures(1), "predictions": -1}}, "field 'overall.predictions' is -1"),
        (
            {"groups": {"a": {**figures(1), "same_top": {"value": 1.5, "low": 1, "high": 2}}}},
            "field 'groups.a.same_top.value' is 1.5",
        ),
        (
            {"overall": {**figures(1), "kl": {"value": 1, "low": [1], "high": 2}}},
            r"field 'overall.kl.low' is \[1\]",
        ),
        (
            {"overall": {**figures(1), "kl": {"value": 1, "low": 3, "high": 2}}},
            "field 'overall.kl.low' is 3; expected overall.kl.high or less",
        ),
    ],
)
def test_comparisons_that_make_no_sense(
    changes: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=says):
        read_comparison(compared(tmp_path / "c.json", **changes))
    read_comparison(compared(tmp_path / "c.json"))


def test_statistics_that_cannot_be_read_cost_no_comparison(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The statistics beside a pruned checkpoint; what was measured is still printed."""
    from reap_driver.workflow.compare import _calibration

    stats, plan = files[0], Plan.load(files[1])
    assert "dead_kept" in _calibration(stats, plan, Console())
    assert _calibration(stats.with_name("none"), plan, Console()) == {}
    stats.write_bytes(stats.read_bytes()[:-1])
    assert _calibration(stats, plan, Console()) == {}
    assert f"is not known: statistics file {stats} cannot be read" in capsys.readouterr().err
