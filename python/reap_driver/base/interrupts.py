"""Handles Ctrl-C, SIGTERM and SIGHUP so that a run stops at a point where no results are lost.

Windows has no SIGHUP; a console that is closed there, or Ctrl-Break, sends SIGBREAK instead.

Signals that the process was started to ignore (by nohup or a shell's background jobs) stay ignored.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

TERMINATIONS: tuple[int, ...] = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal.

    Args:
        text: how far the run got, and how to resume it.
        number: the signal.
    """

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number


class Terminated(SystemExit):
    """SIGTERM or SIGHUP ended the process; its exit status is 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@dataclass
class Stop:
    """Whether a signal has requested the run to stop, and which one."""

    requested: bool = False
    number: int = signal.SIGINT

    def interrupted(self, text: str) -> Interrupted:
        """The exception to raise when the run stops."""
        return Interrupted(text, self.number)


@contextlib.contextmanager
def deferred(on_request: Callable[[], None]) -> Iterator[Stop]:
    """Inside, the first Ctrl-C or SIGTERM requests a stop; a second Ctrl-C ends the run at once.

    On Ctrl-C, torchrun sends its processes SIGTERM in addition to the SIGINT that they received
    themselves, so a SIGTERM does not count as the second.

    Args:
        on_request: called on the first signal.
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
            on_request()

    with _handled((signal.SIGINT, *TERMINATIONS), handle):
        yield stop


@contextlib.contextmanager
def terminations_raised() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Terminated`, so that incomplete files are removed.

    Only the first signal raises; later ones do not interrupt the removal. Contexts may be nested.
    """
    with _handled(TERMINATIONS, _Raise()):
        yield


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP are held back; they are delivered when the block exits.

    For short sequences of steps of which all or none must happen.
    """
    received: list[int] = []
    try:
        with _handled((signal.SIGINT, *TERMINATIONS), lambda number, _: received.append(number)):
            yield
    finally:
        for number in dict.fromkeys(received):
            signal.raise_signal(number)


class _Raise:
    """A handler that raises `Terminated` for the first signal only."""

    def __init__(self) -> None:
        self._raised = False

    def __call__(self, number: int, _: FrameType | None) -> None:
        if not self._raised:
            self._raised = True
            raise Terminated(number)


@contextlib.contextmanager
def _handled(numbers: tuple[int, ...], handler: Callable[[int, FrameType | None], Any]) -> Any:
    """Inside, `handler` receives these signals, except ignored ones. Does nothing outside the main
    thread, the only one that Python delivers signals to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    if isinstance(handler, _Raise):  # the outermost of nested contexts decides which is the first
        before = {n: old for n, old in before.items() if not isinstance(old, _Raise)}
    changed = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in changed:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in changed.items():
            signal.signal(number, old)
