"""Ctrl-C and termination during a long run: heard at once, obeyed where nothing is lost."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was ended on request; its text says how to go on."""


@dataclass
class Stop:
    """Whether somebody has asked the run to end."""

    requested: bool = False


@contextlib.contextmanager
def deferred(heard: Callable[[], None]) -> Iterator[Stop]:
    """Inside, the first Ctrl-C or SIGTERM is a request, a second Ctrl-C ends the run at once.

    torchrun passes a Ctrl-C that its processes have heard themselves on to them as SIGTERM.

    Args:
        heard: called on the first.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the main thread's
        return

    pressed = 0

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal pressed
        pressed += number == signal.SIGINT
        if pressed > 1:
            raise Interrupted("interrupted twice, so nothing more was written")
        if not stop.requested:
            stop.requested = True
            heard()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
