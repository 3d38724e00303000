"""The README and the documentation are true: commands and Python run, links and paths exist."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from bench import tables

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md", "examples/README.md", *DOCS)
LANGUAGES = ("python", "sh")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks that run: not those marked `no-run`, which need a hub,
    another package or a GPU. A block with a title is that file: (title, text).
    """
    found = []
    for lang, info, body in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        title = re.fullmatch(r' title="([\w.]+)"', info)
        if title is not None or (lang in LANGUAGES and not info.strip()):
            found.append((title[1] if title else lang, body))
    return found


RUNNING = [page for page in PAGES if blocks(page)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The files that pages assume: the bundled model, a little data, statistics and a plan."""
    from reap_driver.cli.main import main

    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(ROOT / "python/reap_driver/demo/model", folder / "model")
    lines = [f'{{"text": "def add_{i}(a, b):\\n    return a + b + {i}\\n"}}' for i in range(100)]
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "questions.csv").write_text("question,answer\n" + "What is 2 + 2?,4\n" * 20)
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    (folder / "chats.json").write_text(json.dumps([{"conversations": turns}] * 20))
    model, data, stats, plan = (
        str(folder / name) for name in ("model", "code.jsonl", "stats.safetensors", "plan.json")
    )
    assert main(["observe", model, "--data", data, "--seq-len", "128", "--out", stats, "-q"]) == 0
    assert main(["plan", stats, "--ratio", "0.25", "--out", plan, "-q"]) == 0
    return folder


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("page", RUNNING)
def test_blocks_run_in_order(page: str, files: Path, tmp_path, monkeypatch, capsys) -> None:
    from reap_driver.cli.main import main

    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    ran = 0
    for language, block in blocks(page):
        ran += 1
        if language not in LANGUAGES:
            Path(language).write_text(block)
            continue
        if language == "python":
            exec(compile(block, page, "exec"), namespace)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["reap-kernels"]:
                assert main(words[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
            elif words[:1] == ["make"]:
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), line
            else:
                assert not words, f"{page}: no test runs {line!r}; mark the block no-run"
    assert ran == len(blocks(page)) > 0


def test_every_guide_shows_what_to_run() -> None:
    for page in DOCS:
        if page.startswith("docs/guides/"):
            text = (ROOT / page).read_text(encoding="utf-8")
            assert "```sh" in text or "```python" in text, page


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_what_the_newest_rows_say(page: str) -> None:
    text = (ROOT / page).read_text()
    assert tables.BLOCK.findall(text), f"{page} has lost its tables"
    assert tables.rewritten(text) == text, "run: python -m bench.tables"


@pytest.mark.parametrize("page", PAGES)
def test_paths_named_exist(page: str) -> None:
    whole = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"`[^`]*`", "", whole)  # code holds no links
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    # The site builds the schema itself.
    links = [link for link in links if not link.endswith("schema/plan.json")]
    folders = "reap_kernels|python|bench|tests|docs|examples|csrc"
    paths = re.findall(rf"`((?:{folders})/[\w./-]+)`", whole)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert [*missing, *(path for path in paths if not (ROOT / path).exists())] == []
