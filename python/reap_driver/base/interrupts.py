"""Ctrl-C and termination: heard at once, obeyed where nothing is lost.

Signals that the process was started to ignore (nohup, the background of a shell) stay ignored.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

TERMINATIONS = (signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The run was ended on request; its text says how to go on.

    Args:
        text: what was reached, and how to go on.
        number: the signal that asked.
    """

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number


class Terminated(SystemExit):
    """The process was told to end by SIGTERM or SIGHUP; it ends with 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@dataclass
class Stop:
    """Whether somebody has asked the run to end, and by which signal."""

    requested: bool = False
    number: int = signal.SIGINT

    def interrupted(self, text: str) -> Interrupted:
        """What ends the run."""
        return Interrupted(text, self.number)


@contextlib.contextmanager
def deferred(heard: Callable[[], None]) -> Iterator[Stop]:
    """Inside, the first Ctrl-C or SIGTERM is a request, a second Ctrl-C ends the run at once.

    torchrun passes a Ctrl-C that its processes have heard themselves on to them as SIGTERM.

    Args:
        heard: called on the first.
    """
    stop = Stop()
    pressed = 0

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal pressed
        pressed += number == signal.SIGINT
        if pressed > 1:
            raise Interrupted("interrupted twice, so nothing more was written")
        if not stop.requested:
            stop.requested, stop.number = True, number
            heard()

    with _handled((signal.SIGINT, *TERMINATIONS), handle):
        yield stop


@contextlib.contextmanager
def terminations_raised() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Terminated`, so that what is half-written is removed.

    The first one does; others do not disturb the removal. Contexts may be nested.
    """
    with _handled(TERMINATIONS, _Raise()):
        yield


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP wait: they arrive when the block ends, however it ends.

    For the few steps of which all or none must be done.
    """
    heard: list[int] = []
    try:
        with _handled((signal.SIGINT, *TERMINATIONS), lambda number, _: heard.append(number)):
            yield
    finally:
        for number in dict.fromkeys(heard):
            signal.raise_signal(number)


class _Raise:
    """Raises for the first signal."""

    def __init__(self) -> None:
        self._raised = False

    def __call__(self, number: int, _: FrameType | None) -> None:
        if not self._raised:
            self._raised = True
            raise Terminated(number)


@contextlib.contextmanager
def _handled(numbers: tuple[int, ...], handler: Callable[[int, FrameType | None], Any]) -> Any:
    """Inside, `handler` gets these signals, but for ignored ones; in other threads than the main
    one, to which Python delivers signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    if isinstance(handler, _Raise):  # the outermost of several decides what is the first signal
        before = {n: old for n, old in before.items() if not isinstance(old, _Raise)}
    changed = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in changed:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in changed.items():
            signal.signal(number, old)
