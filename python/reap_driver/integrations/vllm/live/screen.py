"""The view on a terminal: drawn again and again, with keys, until it is ended.

The terminal's own screen and settings come back on every way out: by `q`, by Ctrl-C, by SIGTERM and
by an error.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from reap_driver.integrations.vllm.client import Server
from reap_driver.integrations.vllm.live.look import Look, Wanted, look
from reap_driver.integrations.vllm.live.picture import LEVELS, Style, hidden_layers, lines_of
from reap_driver.workflow.console import printable
from reap_kernels.errors import ReapError

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _TO_END_OF_LINE, _TO_END = "\x1b[H", "\x1b[K", "\x1b[J"
_KEYS = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[5~": "page up", "\x1b[6~": "page down"}
_KEYS |= {"k": "up", "j": "down", " ": "page down", "b": "page up", "q": "quit"}
_KEYS |= {"+": "more", "-": "less"}
_MOVES = {"up": -1, "down": 1, "page up": -10, "page down": 10}  # by layers
_PRESSED = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|.", re.DOTALL)  # one key
_STEP = 0.05  # of the ratio, by a key
_HELP = "q: end   arrows: scroll   + and -: ratio of the plan"


def is_terminal() -> bool:
    """Whether a view can be drawn on stdout."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")


def style_of_stdout(*, color: bool) -> Style:
    """How lines are drawn on stdout; NO_COLOR and what the encoding lacks are respected."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        LEVELS.encode(encoding)
        blocks = True
    except (UnicodeEncodeError, LookupError):
        blocks = False
    width = shutil.get_terminal_size().columns
    return Style(width, color and not os.environ.get("NO_COLOR"), blocks)


def watch(server: Server, wanted: Wanted, interval: float) -> None:
    """Shows a server until the user ends it by `q` or Ctrl-C.

    Where it no longer answers, the last picture stays, with the reason, and it is asked again.

    Args:
        server: that is shown.
        wanted: the plan whose margin is shown at first.
        interval: seconds from one look to the next.

    Raises:
        ReapError: the server does not answer at the first look.
    """
    seen = look(server, wanted, time.monotonic())
    with contextlib.suppress(KeyboardInterrupt), _screen() as keys:
        first, due = 0, time.monotonic() + interval
        while True:
            first = _draw(seen, first)
            for pressed in keys(max(0.0, due - time.monotonic())):
                if pressed == "quit":
                    return
                if pressed in ("more", "less"):
                    wanted = replace(wanted, ratio=_ratio(wanted.ratio, pressed))
                    due = time.monotonic()
                first += _MOVES.get(pressed, 0)
            if time.monotonic() >= due:
                seen = _next(server, wanted, seen)
                due = time.monotonic() + interval


def _next(server: Server, wanted: Wanted, before: Look) -> Look:
    """The next look; the one before with the reason where the server does not answer."""
    try:
        return look(server, wanted, time.monotonic(), before)
    except ReapError as error:
        return replace(before, problem=f"not up to date: {error}", rates={})


def _ratio(ratio: float, pressed: str) -> float:
    """The next multiple of the step, above 0 and below 1."""
    steps = round(ratio / _STEP) + (1 if pressed == "more" else -1)
    return round(min(max(1, steps), round(1 / _STEP) - 1) * _STEP, 6)


def _draw(seen: Look, first: int) -> int:
    """Draws a picture; returns the layer at its top."""
    height = shutil.get_terminal_size().lines
    style = style_of_stdout(color=True)
    first = max(0, min(first, hidden_layers(seen, style, height - 1)))
    lines = [
        *lines_of(seen, style, height - 1, first),
        style.painted(_HELP[: style.width], "\x1b[2m"),
    ]
    text = f"{_TO_END_OF_LINE}\r\n".join(lines[:height])
    _write(f"{_HOME}{text}{_TO_END_OF_LINE}{_TO_END}")
    return first


def _write(text: str) -> None:
    """Writes to the terminal, with escapes for what its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


@contextlib.contextmanager
def _screen() -> Iterator[Callable[[float], list[str]]]:
    """A screen of its own, without a cursor, and keys that are read as they are pressed.

    Yields:
        What waits so many seconds for keys, and returns the names of those that came.
    """
    try:
        with _keys() as read:
            _write(_ENTER)
            yield read
    finally:
        _write(_LEAVE)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], list[str]]]:
    """Reads keys from stdin where it is a terminal of a POSIX system; elsewhere none come."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield _nothing
        return
    import termios

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    changed = termios.tcgetattr(number)
    changed[3] &= ~(termios.ICANON | termios.ECHO)  # Ctrl-C stays a signal
    try:
        termios.tcsetattr(number, termios.TCSADRAIN, changed)
        yield _pressed
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def _nothing(seconds: float) -> list[str]:
    time.sleep(seconds)
    return []


def _pressed(seconds: float) -> list[str]:
    """The keys that are pressed within so many seconds."""
    number = sys.stdin.fileno()
    ready, _, _ = select.select([number], [], [], seconds)
    if not ready:
        return []
    text = os.read(number, 1024).decode(errors="replace")
    if not text:  # the terminal is gone
        return ["quit"]
    return [_KEYS.get(key, "") for key in _PRESSED.findall(text)]


def plain(seen: Look) -> str:
    """A picture without colors, of every layer, for what is no terminal."""
    return printable("\n".join(lines_of(seen, style_of_stdout(color=False))))
