"""Every program in examples/ runs, and prints what it found."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_programs_run(program: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path / "out")])
    runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_list_of_programs_is_complete() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert PROGRAMS
    for program in PROGRAMS:
        assert f"[{program.name}]({program.name})" in text, program.name


@pytest.mark.parametrize("name", ["observe_layer.py", "accumulate.py"])
def test_both_tools_stay_short(name: str) -> None:
    lines = [line for line in (EXAMPLES / name).read_text().splitlines() if line.strip()]
    assert len(lines) <= 35, f"{name} has {len(lines)} lines"
