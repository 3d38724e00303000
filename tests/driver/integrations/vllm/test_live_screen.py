"""The view on a pseudo-terminal: it is drawn, answers keys, and leaves the terminal as it was."""

import io
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from reap_driver.cli.main import main
from tests.driver.integrations.vllm.fake_server import FakeServer, serving, statistics, status
from tests.forks import Fork
from tests.limits import HUNG

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    """A server of a model of 40 layers."""
    with serving() as server:
        stats = statistics(layers=40)
        stats.save(tmp_path / "stats.safetensors")
        server.tell("GET status", status(layers=40))
        server.tell("GET stats", (tmp_path / "stats.safetensors").read_bytes())
        yield server


class Terminal:
    """A command line in a fork, whose terminal this is.

    Attributes:
        shown: what it has written so far.
    """

    def __init__(self, *words: str) -> None:
        self._ours, self._theirs = os.openpty()
        termios.tcsetwinsize(self._theirs, (24, 80))
        self.before = termios.tcgetattr(self._theirs)
        self.shown = ""

        def call(_: Connection) -> int:
            errors = os.dup(2)  # stay those of the fork
            os.login_tty(os.dup(self._theirs))  # which Ctrl-C then comes from
            os.dup2(errors, 2)
            sys.stdin, sys.stdout = (
                io.TextIOWrapper(io.FileIO(0)),
                io.TextIOWrapper(io.FileIO(1, "w")),
            )
            os.environ |= {"TERM": "xterm", "LANG": "C.UTF-8"}
            for name in ("NO_COLOR", "COLUMNS", "LINES"):
                os.environ.pop(name, None)
            return main(["live", *words])

        self.fork = Fork(call)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self.fork.__exit__(None, None, None)
        os.close(self._ours)
        os.close(self._theirs)

    def wait_for(self, text: str) -> str:
        """Reads until a text is shown; returns what was shown up to it and takes it away."""
        end = time.monotonic() + HUNG
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            ready, _, _ = select.select([self._ours], [], [], 0.05)
            if ready:
                self.shown += os.read(self._ours, 1 << 16).decode()
            elif self.fork.ended:
                raise AssertionError(f"ended without {text!r}: {self.shown}")
        found, _, self.shown = self.shown.partition(text)
        return found + text

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    @property
    def now(self) -> list[object]:
        """The terminal's settings."""
        return termios.tcgetattr(self._theirs)


@pytest.mark.parametrize(("key", "code"), [(b"\x03", 0), (b"q", 0), (signal.SIGTERM, 143)])
def test_the_terminal_comes_back(fake: FakeServer, key: bytes | int, code: int) -> None:
    with Terminal(fake.url) as terminal:
        assert terminal.wait_for(ENTER) == ENTER
        terminal.wait_for("layers 1 to 11 of 40")
        terminal.wait_for("arrows: scroll")
        assert terminal.now != terminal.before
        if isinstance(key, bytes):
            terminal.press(key)
        else:
            os.kill(terminal.fork.pid, key)
        terminal.wait_for(LEAVE)
        ended = terminal.fork.end()
        assert ended.code == code
        assert terminal.now == terminal.before
    assert "Traceback" not in ended.err
    assert ended.err == "" or code


def test_keys(fake: FakeServer) -> None:
    """Scroll to both ends, and change the ratio of the plan, which asks the server at once."""
    with Terminal(fake.url, "--interval", "1000", "--ratio", "0.45") as terminal:
        terminal.wait_for("layers 1 to 11 of 40")
        terminal.press(b"\x1b[B")
        terminal.wait_for("layers 2 to 12 of 40")
        terminal.press(b" ")
        terminal.wait_for("layers 12 to 22 of 40")
        terminal.press(b"\x1b[6~")
        terminal.press(b"\x1b[6~")
        terminal.wait_for("layers 30 to 40 of 40")
        terminal.press(b"k")
        terminal.wait_for("layers 29 to 39 of 40")
        terminal.press(b"?")  # which means nothing
        terminal.press(b"+")
        terminal.wait_for("keeps 4 of 8 experts")
        assert len([one for one in fake.asked if one.path == "/reap/status"]) == 2
        terminal.press(b"q")
        assert terminal.fork.end().code == 0


def test_a_server_that_goes_away_and_comes_back(fake: FakeServer) -> None:
    """The picture stays, with the reason."""
    with Terminal(fake.url, "--interval", "0.05") as terminal:
        terminal.wait_for("layers 1 to 11 of 40")
        fake.refuse("GET status", 503, "the engine has died; restart the server")
        terminal.wait_for("not up to date")
        terminal.wait_for("layers 1 to")
        fake.tell("GET status", status(layers=40, groups={"all": 77}))
        terminal.wait_for("tokens    77")
        terminal.press(b"\x03")
        assert terminal.fork.end().code == 0


def test_a_server_that_is_not_there() -> None:
    """The screen is not entered."""
    with serving() as fake:
        url = fake.url
    with Terminal(url) as terminal:
        ended = terminal.fork.end()
    assert ended.code == 4
    assert ended.err.startswith(f"reap-kernels: error: {url}: cannot be reached")
    assert terminal.shown == ""
