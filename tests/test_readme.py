"""The README tells the truth: its commands and Python blocks run, its make targets exist."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from bench import tables

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ("README.md", "CONTRIBUTING.md")


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language, without those marked `no-run` (they need a hub or a GPU)."""
    text = (ROOT / "README.md").read_text()
    return [
        body for lang, info, body in BLOCK.findall(text) if lang == language and not info.strip()
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the files the README assumes: the bundled model and a little text."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "python/reap_driver/demo/model", folder / "model")
    lines = [f'{{"text": "def add_{i}(a, b):\\n    return a + b + {i}\\n"}}' for i in range(200)]
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_what_the_newest_rows_say(page: str) -> None:
    text = (ROOT / page).read_text()
    assert tables.BLOCK.findall(text), f"{page} has lost its tables"
    assert tables.rewritten(text) == text, "run: python -m bench.tables"


def test_commands_run_in_order(workplace, monkeypatch, capsys) -> None:
    from reap_driver.cli.main import main

    monkeypatch.chdir(workplace)
    ran = 0
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["reap-kernels"]:
                assert main(words[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
                ran += 1
            elif words[:1] == ["make"]:
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), line
    assert ran >= 4


def test_python_blocks_run_in_order(workplace, monkeypatch) -> None:
    monkeypatch.chdir(workplace)
    namespace: dict = {}
    found = blocks("python")
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_paths_named_exist(page: str) -> None:
    text = re.sub(r"`[^`]*`", "", (ROOT / page).read_text())  # code holds no links
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:reap_kernels|python|bench|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
