"""Progress where stderr is no terminal, and the words numbers are put in."""

import io
import os

import pytest

from reap_driver.base.units import clock, short, significant, took
from reap_driver.workflow import listener
from reap_driver.workflow.console import Console


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(listener.time, "monotonic", lambda: self.now)


def test_lines_are_few_and_say_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Console().progress("observing", "tok", 1_000_000) as progress:
        for _ in range(1000):
            clock.now += 0.1
            progress.add(1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "observing: 21ktok, 10ktok/s, 2 % of 1Mtok, 1:38 left"
    assert lines[-1] == "observing: 1Mtok, 10ktok/s, 100 % of 1Mtok, 0:00 left"
    assert len(lines) == 11


def test_what_is_quick_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Console().progress("writing", "B", 100) as progress:
        for done in range(1, 101):
            clock.now += 0.019
            progress.reach(done, 100)
    assert capsys.readouterr().err == ""


def test_slow_work_without_an_end_still_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Console().progress("reading data", "tok") as progress:
        for _ in range(200):
            clock.now += 1
            progress.add(50)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading data: 150tok, 50tok/s"
    assert len(lines) == 4  # one at once, then one a minute


def test_quiet_and_json_keep_stdout_and_stderr_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    quiet = Console(quiet=True)
    with quiet.progress("observing", "tok", 10) as progress:
        clock.now += 100
        progress.add(5)
    quiet.say("result")
    quiet.note("something")
    assert capsys.readouterr() == ("", "")
    machine = Console(as_json=True)
    machine.say("result")
    machine.note("something")
    assert capsys.readouterr() == ("", "note: something\n")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    class Bar:
        def __init__(self, **options: object) -> None:
            shown.append(options)

        def update(self, count: int) -> None:
            shown.append(count)

        def close(self) -> None:
            shown.append("closed")

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.tqdm", Bar)
    with Console().progress("observing", "tok", 10) as progress:
        progress.add(4)
        progress.reach(10, 10)
    assert shown[0]["delay"] == 2
    assert (shown[0]["total"], shown[0]["unit"]) == (10, "tok")
    assert shown[1:] == [4, 6, "closed"]


def test_a_bar_counts_days(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", shown)
    now = [1e6]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Console().progress("observing", "tok", 12_000) as progress:
        now[0] += 86_400
        progress.add(1000)
        drawn = shown.getvalue()
    assert "| 1.00k/12.0k [1 day<11 days, " in drawn


@pytest.mark.does_not_raise
def test_work_goes_on_when_nobody_reads_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        for line in ("first", "second"):
            Console().say(line)


def test_words_for_numbers() -> None:
    numbers = (0, 7, 999, 1000, 1_234_567, 7_090_000_000, 1e12)
    assert [short(n) for n in numbers] == ["0", "7", "999", "1k", "1.23M", "7.09G", "1T"]
    assert [clock(s) for s in (0, 59.6, 75, 4000)] == ["0:00", "1:00", "1:15", "1:06:40"]
    figures = [significant(n) for n in (2293.4, 22934.6, 0.01, 10.5, 9999.9, float("inf"))]
    assert figures == ["2293", "22935", "0.01000", "10.50", "10000", "inf"]
    days = (86_399, 86_400, 950_400, 975_600, 10 * 86_400 - 60)
    assert [clock(s) for s in days] == ["23:59:59", "1 day", "11 days", "11 days 7 h", "10 days"]
    assert [took(s) for s in (0.04, 59.9, 61)] == ["0.0 s", "59.9 s", "1:01"]
