"""Command lines in forks of this process, which ended by a signal at a moment that a test chose."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from reap_driver.cli.main import main
from reap_driver.plan_search import recorder
from reap_driver.plan_search.search_state import SearchState
from tests import forks
from tests.forks import Ended

# Events of Python's audit hooks before which what is on disk may differ from what it was.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def forked(arguments: list[str], prepare: Callable[[], None] = lambda: None) -> Ended:
    """Runs a command line in a fork, in which `prepare` is called first."""

    def call() -> int:
        prepare()
        return main(arguments)

    return forks.forked(call)


def killed_before(change: int | None, counter: Any) -> Callable[[], None]:
    """What makes a fork kill itself before its `change`-th change to files, all counted; None:
    never. `counter` is a shared integer.
    """

    def watch(event: str, args: tuple[Any, ...]) -> None:
        changing = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
        if event in _CHANGES or changing:
            counter.value += 1
            if counter.value == change:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(watch)


def signalled_behind(writes: int, number: int) -> Callable[[], None]:
    """What has a search in a fork write its state behind every candidate, and sends it a signal
    after so many of them.
    """
    write = SearchState.write

    def counted(self: SearchState, *arguments: Any) -> None:
        nonlocal writes
        write(self, *arguments)
        writes -= 1
        if not writes:
            os.kill(os.getpid(), number)

    def prepare() -> None:
        recorder._WRITE_AFTER = -1
        SearchState.write = counted

    return prepare
