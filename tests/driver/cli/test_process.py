"""What only a process of its own shows: help without torch, Ctrl-C, exit codes, progress."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import reap_driver as rd

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
    assert max(map(len, done.stdout.splitlines())) <= 100


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


def test_public_names_are_not_hidden_by_modules_of_the_same_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Importing the module `observe` must not put it in the place of the function `observe`."""
    monkeypatch.delitem(sys.modules, "reap_driver.observation.observer", raising=False)
    module = importlib.import_module("reap_driver.observation.observer")
    assert rd.observe is module.observe
    for name in rd.__all__:
        assert getattr(rd, name) is not module
    with pytest.raises(AttributeError, match="'reap_driver' has no attribute 'nothing'"):
        _ = rd.nothing


def test_python_m_is_the_command() -> None:
    done = python("-m", "reap_driver", "plan", "/nowhere/stats", "--out", "/nowhere/plan")
    assert done.returncode == 3
    assert done.stderr.startswith("reap-kernels: error: /nowhere/plan: the folder /nowhere does")
    assert done.stdout == ""


def begun(model: Path, folder: Path, *more: str) -> "subprocess.Popen[str]":
    """A long observation that has shown its first line of progress."""
    data = folder / "long.jsonl"
    lengths = [1999, 2001] * 50  # of equal ones, a note says that they could be kept
    records = ({"input_ids": [i % 250 for i in range(length)]} for length in lengths)
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["prune", model, "--data", data, "--seq-len", "16", "--out", folder / "out"]
    words += ["--stats", folder / "stats.safetensors", *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "reap_driver", *map(str, words)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests started in the background of a shell ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("observing: "), line  # after two seconds
    assert "tok/s" in line
    assert "left" in line
    return process


def ended(process: "subprocess.Popen[str]", number: signal.Signals) -> str:
    """The last line of a run that was sent a signal."""
    try:
        process.send_signal(number)
        out, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert out == ""
    return err.splitlines()[-1]


def test_interrupting_without_a_journal_leaves_nothing(model: Path, tmp_path: Path) -> None:
    process = begun(model, tmp_path, "--no-journal")
    before = sorted(tmp_path.rglob("*"))
    line = ended(process, signal.SIGINT)
    assert line.startswith("reap-kernels: error: interrupted; no half-written")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_writes_the_journal(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """And says where it is and how to go on: 8 folds of 37 batches."""
    line = ended(begun(model, tmp_path), number)
    journal = tmp_path / "out.journal"
    assert re.search(rf"interrupted after \d+ of 296 batches; the journal is in {journal}", line)
    assert line.endswith("with --resume to continue from there")
    done = int(re.findall(r"after (\d+) of", line)[0])
    assert json.loads((journal / "journal.json").read_text())["position"] == done > 0
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "long.jsonl",
        "model",
        "out.journal",
    ]
