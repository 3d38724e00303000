"""What a terminal shows: widths, bars that end where the work does, and logs without bars."""

import contextlib
import functools
import io
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import tqdm
import transformers.utils.logging as library
from huggingface_hub.utils import are_progress_bars_disabled

import reap_driver as rd
from reap_driver.base.library_bars import no_library_bars
from reap_driver.cli.commands import COMMANDS
from reap_driver.cli.main import main
from reap_driver.workflow import console
from reap_driver.workflow.console import Console
from reap_driver.workflow.listener import Listener, Step
from tests import forks
from tests.driver.cli.conftest import Run
from tests.driver.cli.forks import forked

NAMES = [command.NAME for command in COMMANDS]


@pytest.mark.parametrize("command", [None, *NAMES])
def test_help_fits_80_columns(
    command: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert len(lines) > 10
    assert not [line for line in lines if len(line) > 80]
    assert lines[0].startswith("usage: reap-kernels")
    assert command is None or lines[1] == "", "the usage is one line"


def test_results_fit_80_columns(
    run: Run,
    originals: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What commands print, but for paths, which stay whole."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(originals["plain"])
    data.rename("code.jsonl")
    shutil.copy("code.jsonl", "the-text-of-the-other-group.jsonl")
    sources = ["--data", "code.jsonl", "--data", "the-text-of-the-other-group.jsonl"]
    own = [*sources, "--seq-len", "32"]
    search = ["--evaluations", 5, "--population", 3, "--elites", 1]
    for words, rows in (
        (["observe", "model", *own, "--out", "stats"], 5),
        (["plan", "stats", "--out", "plan.json"], 2),
        (["plan", "stats", "--ratio", 0.25, "--out", "quarter.json"], 2),
        (["prune", "model", *own, "--out", "half"], 8),
        (["prune", "model", *own, "--dry-run"], 12),
        (["refit", "half", "--original", "model", *own, "--dry-run"], 9),
        (["refit", "half", "--original", "model", *own, "--out", "refit"], 20),
        (["apply", "model", "quarter.json", "--out", "cut"], 2),
        (["apply", "model", "plan.json", "--as-masks", "masks"], 2),
        (["search", "model", "stats", *own, *search, "--ratio", 0.25, "--out", "found"], 2),
        (["compare", "model", "half", *own], 20),
        (["compare", "model", "plan.json", "quarter.json", "half", *own], 25),
        (["report", "stats", "plan.json", "--out", "page"], 1),
        (["recipe"], 2),
        (["doctor"], 15),
    ):
        done = run(*words)
        assert done.code == 0, done.err
        lines = [line for line in done.out.splitlines() if "/" not in line]
        assert len(lines) >= rows - ("/" in done.out), done.out
        assert not [line for line in lines if len(line) > 80]
        assert "\r" not in done.err + done.out


class Steps(Listener):
    """Keeps how far each step got, at most and in the end."""

    def __init__(self) -> None:
        self.steps: list[tuple[Step, list[float]]] = []

    def step(self, what: str, unit: str, total: int | None) -> Step:
        step, seen = Step(what, unit, total), [0.0]
        step.changed = lambda: seen.append(step.done)  # type: ignore[method-assign]
        self.steps.append((step, seen))
        return step

    def check(self, *names: str) -> None:
        """Each step with a total ends there, and was never behind it."""
        known = [(step, seen) for step, seen in self.steps if step.total is not None]
        assert [step.what for step, _ in known] == list(names)
        for step, seen in known:
            assert (step.what, seen[-1], max(seen)) == (step.what, step.total, step.total)


def test_every_step_ends_at_its_total(
    originals: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """A bar whose count is above its total has no fraction and less than no time left."""
    model, own = originals["plain"], {"seq_len": 20, "batch_size": 3}
    for stream in ("never", "always"):
        steps = Steps()
        rd.observe_data(model, data, out=tmp_path / stream, stream=stream, progress=steps, **own)
        steps.check("observing")
    steps = Steps()
    rd.observe_data(model, data, packing="none", batch_size=7, progress=steps)
    steps.check("observing")
    steps = Steps()
    rd.prune(model, data, out=tmp_path / "half", shard_size=50_000, progress=steps, **own)
    steps.check("observing", "writing")
    for stream, names in {"always": (), "never": ("following the routing",)}.items():
        steps = Steps()
        rd.compare(model, tmp_path / "half", data, stream=stream, progress=steps, **own)
        steps.check("comparing", *names)
    steps = Steps()
    search = {"evaluations": 5, "population": 3, "elites": 1, "progress": steps}
    rd.search(model, tmp_path / "never", data, ratio=0.25, **search, **own)
    steps.check("searching")


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What stdout and stderr are from now on: a terminal, where every change of a bar is drawn."""
    shown = io.StringIO()
    shown.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(console, "_SILENT", 0)
    init = tqdm.tqdm.__init__
    drawn = functools.partialmethod(init, mininterval=0, miniters=0)
    monkeypatch.setattr(tqdm.tqdm, "__init__", drawn)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, shown)
    return shown


def test_a_bar_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares that add up to more than the whole by rounding change nothing."""
    screen = terminal(monkeypatch)
    with warnings.catch_warnings(), Console().progress("observing", "tok", 999) as progress:
        warnings.simplefilter("error")
        for _ in range(60):
            progress.add(999 / 60)
    assert sum(999 / 60 for _ in range(60)) <= 999 / 60 * 60 or progress.done == 999
    assert "100%|" in screen.getvalue()
    assert "<-" not in screen.getvalue()


def test_what_is_said_during_a_bar_is_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an error has no remains of it before or behind its line."""
    screen = terminal(monkeypatch)
    heard = Console()
    with contextlib.suppress(RuntimeError), heard.progress("observing", "tok", 10) as progress:
        progress.add(4)
        heard.note("a remark")
        heard.say("a result")
        progress.add(3)
        raise RuntimeError
    heard.note("behind")
    drawn = on_screen(screen.getvalue())
    assert drawn == ["note: a remark", "a result", "note: behind"]
    assert "70%" in screen.getvalue()


def on_screen(text: str) -> list[str]:
    """The lines a terminal shows, for text with carriage returns."""
    lines = []
    for line in text.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


@contextlib.contextmanager
def library_bars_on() -> Iterator[None]:
    before = library.is_progress_bar_enabled()
    library.enable_progress_bar()
    yield
    (library.enable_progress_bar if before else library.disable_progress_bar)()


def test_library_bars_are_off_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    with library_bars_on():
        with Console().progress("observing", "tok", 10):
            assert are_progress_bars_disabled()
            assert not library.is_progress_bar_enabled()
        assert library.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
        with pytest.raises(RuntimeError), no_library_bars():
            raise RuntimeError
        assert library.is_progress_bar_enabled()


@pytest.mark.parametrize("words", [["--quiet"], []])
def test_logs_have_no_bars(
    originals: dict[str, Path], data: Path, tmp_path: Path, words: list[str]
) -> None:
    """Loading by a device map, where transformers has a bar: not when quiet, nor in a log."""
    command = ["observe", originals["plain"], "--data", data, "--out", tmp_path / "out", *words]

    def call() -> int:
        library.enable_progress_bar()
        return main([str(word) for word in [*command, "--device-map", "auto"]])

    ended = forks.forked(call)
    assert ended.code == 0, ended.err
    assert "\r" not in ended.err
    assert "\x1b" not in ended.err + ended.out
    assert not words or (ended.out, ended.err) == ("", "")


def test_a_full_disk_behind_stdout() -> None:
    """One line and exit code 4, also where the result cannot be printed."""

    def prepare() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    ended = forked(["doctor"], prepare)
    assert ended.code == 4
    [line] = ended.err.splitlines()
    assert line.startswith("reap-kernels: error: standard output: No space left on device; free")
