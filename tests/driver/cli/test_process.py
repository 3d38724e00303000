"""What only a process of its own shows: help without torch, Ctrl-C, exit codes, progress."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
from reap_driver.cli.main import main
from reap_driver.observation import run
from reap_driver.workflow import console
from tests.forks import Ended, forked

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
}
COMMANDS = ("demo", "prune", "observe", "plan", "apply", "doctor")
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "matplotlib")


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A Python process."""
    return subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_teaches_and_imports_nothing_heavy(command: str | None) -> None:
    """`bench startup` times it."""
    script = f"""
import sys
from reap_driver.cli.main import main
try:
    main({[command, "--help"] if command else ["--help"]!r})
except SystemExit as stop:
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    sys.exit(stop.code or " ".join(loaded) or 0)
"""
    done = python("-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:" in done.stdout or command is None
    example = f"reap-kernels {command}" if command else "reap-kernels prune MODEL --data"
    assert f"  {example}" in done.stdout


def test_importing_the_package_imports_no_torch() -> None:
    done = python(
        "-c",
        f"""
import sys, reap_driver
assert not [name for name in {HEAVY!r} if name in sys.modules]
assert set(reap_driver.__all__) <= set(dir(reap_driver))
""",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names_are_not_hidden_by_modules_of_the_same_name() -> None:
    """Importing the module `observe` must not put it in the place of the function `observe`. In a
    fork, since other modules keep what they import from one that is imported twice.
    """

    def call() -> None:
        sys.modules.pop("reap_driver.observation.observer", None)
        module = importlib.import_module("reap_driver.observation.observer")
        assert rd.observe is module.observe
        for name in rd.__all__:
            assert getattr(rd, name) is not module
        with pytest.raises(AttributeError, match="'reap_driver' has no attribute 'nothing'"):
            _ = rd.nothing

    ended = forked(call)
    assert ended.code == 0, ended.err


def test_python_m_is_the_command() -> None:
    """And plans without transformers, whose import takes longer than the plan."""
    words = ["-m", "reap_driver", "plan", "/nowhere/stats", "--out", "/nowhere/plan"]
    done = python("-X", "importtime", *words)
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time: ")]
    assert done.returncode == 3
    assert len(said) == 1
    assert said[0].startswith("reap-kernels: error: /nowhere/plan: the folder /nowhere does")
    assert done.stdout == ""
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "reap_driver.workflow.plan" in imported
    assert "transformers" not in imported


def interrupted(model: Path, folder: Path, number: signal.Signals, *more: str) -> Ended:
    """A run that shows progress and is sent a signal while its third batch is computed."""
    data = folder / "tokens.jsonl"
    lengths = [39, 41] * 5
    records = ({"input_ids": [i % 250 for i in range(length)]} for length in lengths)
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["prune", model, "--data", data, "--seq-len", "16", "--out", folder / "out"]
    words += ["--stats", folder / "stats.safetensors", "--batch-size", "2", *more]
    feed, fed = run.Run.feed, 0

    def signaled(self: run.Run, *batch: Any) -> Any:
        nonlocal fed
        fed += 1
        if fed == 3:
            os.kill(os.getpid(), number)
        return feed(self, *batch)

    def call() -> int:
        run.Run.feed = signaled  # type: ignore[method-assign]
        console._SILENT = 0  # progress shows from the first batch
        return main([str(word) for word in words])

    ended = forked(call)
    assert ended.code == 128 + number
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert re.search("^observing: .*tok/s, .* left$", ended.err, re.MULTILINE)
    return ended


def test_interrupting_without_a_journal_leaves_nothing(model: Path, tmp_path: Path) -> None:
    ended = interrupted(model, tmp_path, signal.SIGINT, "--no-journal")
    line = ended.err.splitlines()[-1]
    assert line.startswith("reap-kernels: error: interrupted; no half-written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokens.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_writes_the_journal(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """And says where it is and how to go on, behind the batch at work."""
    line = interrupted(model, tmp_path, number).err.splitlines()[-1]
    journal = tmp_path / "out.journal"
    assert re.search(rf"interrupted after 3 of \d+ batches; the journal is in {journal}", line)
    assert line.endswith("with --resume to continue from there")
    assert json.loads((journal / "journal.json").read_text())["position"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model",
        "out.journal",
        "tokens.jsonl",
    ]
