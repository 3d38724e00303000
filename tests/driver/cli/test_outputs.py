"""Outputs of every command: never an input of the run, never a file of a checkpoint."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reap_driver.cli.commands import COMMANDS
from reap_driver.cli.main import build_parser
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.workflow.outputs import check_journal_folder
from reap_kernels.errors import CheckpointError
from tests.driver.cli.conftest import Run
from tests.driver.writer import saved

# What is read, by its name below `tmp_path`, and the command line; {out} is what is written.
COMMAND_LINES = {
    "observe": "observe model --data code.jsonl --recipe mix.yaml --out {out} --overwrite",
    "prune": "prune model --data code.jsonl --recipe mix.yaml --overwrite --out new --stats {out}",
    "plan": "plan stats.safetensors --layer-ratios ratios.yaml --out {out} --overwrite",
    "search": "search model stats.safetensors --data code.jsonl --out {out} --overwrite",
    "tune": "tune model --out {out} --overwrite",
    "apply": "apply model plan.json --as-masks {out} --overwrite",
    "convert": "convert stats.safetensors --plan plan.json --to vllm-ascend-list --out {out} "
    "--overwrite",
}
CHECKPOINT = [
    "model/config.json",
    "model/tokenizer.json",
    "model/model.safetensors.index.json",
    "model/model-00001-of-00008.safetensors",
    "model/new.json",  # none yet
    "model/model.safetensors",  # which would be loaded in place of the shards
    "other/config.json",
    "other/reap/plan.json",
]
INPUTS = ["code.jsonl", "mix.yaml", "more.jsonl", "stats.safetensors", "ratios.yaml", "plan.json"]
Link = Callable[[Path, Path], None]


@pytest.fixture
def place(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all of them, in which commands run."""
    saved.make_plan(model, meta_model(load_config(model))).save(tmp_path / "plan.json")
    (tmp_path / "stats.safetensors").write_text("read after the check")
    (tmp_path / "more.jsonl").write_text(data.read_text())
    (tmp_path / "mix.yaml").write_text("- source: more.jsonl\n")
    (tmp_path / "ratios.yaml").write_text("{}")
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "other" / "reap").mkdir()
    shutil.copy(tmp_path / "plan.json", tmp_path / "other" / "reap")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def direct(_: Path, __: Path) -> None:
    """No link: the name itself."""


def cases() -> list[tuple[str, str, Link]]:
    """Every command with every input it has, and with files of checkpoints; links to some."""
    found = []
    for command, line in COMMAND_LINES.items():
        read = [name for name in INPUTS if f" {name} " in line]
        read += ["more.jsonl"] if "mix.yaml" in read else []  # which the recipe names
        places = CHECKPOINT if command == "observe" else CHECKPOINT[:1] + CHECKPOINT[-2:-1]
        found += [(command, name, direct) for name in read + places]
        found += [(command, name, link) for name in read[:1] for link in (os.link, os.symlink)]
        found += [(command, CHECKPOINT[3], os.symlink)]
    return found


@pytest.mark.parametrize(("command", "name", "link"), cases())
def test_is_refused(run: Run, place: Path, command: str, name: str, link: Link) -> None:
    out = name
    if link is not direct:
        out = "link"
        link(place / name, place / out)
    before = saved.snapshot(place)
    outcome = run(*COMMAND_LINES[command].format(out=out).split())
    assert outcome.code == 3
    assert "with --overwrite or without; choose" in outcome.error
    assert f"error: {out}: is " in outcome.error
    assert saved.snapshot(place) == before


def test_a_hard_link_to_a_shard(run: Run, place: Path) -> None:
    os.link(place / CHECKPOINT[3], place / "link")
    before = saved.snapshot(place)
    outcome = run(*COMMAND_LINES["observe"].format(out="link").split())
    assert outcome.code == 3
    assert f"link: is model/{Path(CHECKPOINT[3]).name}, which this run reads" in outcome.error
    assert saved.snapshot(place) == before


@pytest.mark.parametrize("name", ["stats.safetensors", "plan.json", "compare.json"])
def test_pictures_over_what_they_show(run: Run, place: Path, name: str) -> None:
    (place / "compare.json").write_text("{}")
    (place / "report").mkdir()
    os.link(place / name, place / "report" / "report.html")
    before = saved.snapshot(place)
    words = "report stats.safetensors plan.json --compare compare.json --out report --overwrite"
    outcome = run(*words.split())
    assert outcome.code == 3
    assert f"report.html: is {name}, which this run reads" in outcome.error
    assert saved.snapshot(place) == before


@pytest.mark.parametrize(
    "words",
    [
        "report stats.safetensors --out other --overwrite",
        "demo --out other",
        "apply model other/reap/plan.json --out other --overwrite",
        "apply model plan.json --out . --overwrite",
        "apply model plan.json --out model --overwrite",
        "apply model plan.json --out model/new --overwrite",
        "apply model plan.json --refit --data other/code.jsonl --out other --overwrite",
        "refit model --original other --data other/code.jsonl --out other --overwrite",
        "prune model --data other/code.jsonl --out other --overwrite",
        "prune model --data code.jsonl --out other --stats other/stats --overwrite",
        "prune model --data code.jsonl --out model --overwrite",
    ],
)
def test_folders(run: Run, place: Path, words: str) -> None:
    shutil.copy(place / "code.jsonl", place / "other")
    before = saved.snapshot(place)
    outcome = run(*words.split())
    assert outcome.code == 3
    assert "choose" in outcome.error
    assert saved.snapshot(place) == before


def test_no_command_is_missing() -> None:
    """The commands of this file are those that write files."""
    parser = build_parser()
    [commands] = [action for action in parser._actions if action.dest == "command"]
    writing = {
        name
        for name, sub in commands.choices.items()
        if any(option in sub._option_string_actions for option in ("--out", "--as-masks"))
    }
    assert writing == {*COMMAND_LINES, "report", "demo", "refit"}
    assert len(COMMANDS) == len(commands.choices)


@pytest.mark.parametrize("more", [[], ["--no-journal"], ["--overwrite"]])
def test_a_folder_in_the_place_of_the_journal(run: Run, place: Path, more: list[str]) -> None:
    """It is somebody's, and would be deleted in the end."""
    (place / "out.journal").mkdir()
    (place / "out.journal" / "notes.txt").write_text("mine")
    before = saved.snapshot(place)
    outcome = run("observe", "model", "--data", "code.jsonl", "--out", "out", *more)
    assert outcome.code == 3
    assert "holds 'notes.txt', which is none" in outcome.error
    assert saved.snapshot(place) == before


def test_what_a_journal_leaves_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "out.journal"
    check_journal_folder(folder)
    (folder / "states-00003").mkdir(parents=True)
    for name in ("journal.json", ".journal.json.0123abcd", "stats-000003.safetensors"):
        (folder / name).touch()
    (folder / ".stats-000003.safetensors.0123abcd").touch()
    check_journal_folder(folder)
    (tmp_path / "link.journal").symlink_to(folder)
    with pytest.raises(CheckpointError, match=r"link\.journal: is where the journal goes"):
        check_journal_folder(tmp_path / "link.journal")
