"""Command lines in forks of this process, which ended by a signal at a moment that a test chose."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reap_driver.cli.main import main

# Events of Python's audit hooks before which what is on disk may differ from what it was.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def forked(arguments: list[str], err: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Runs a command line; a fork has everything imported already, and starts at once.

    Args:
        arguments: of the command.
        err: file that takes what it says on stderr.
        prepare: called in the fork first.

    Returns:
        The exit code, or minus the number of the signal that ended it.
    """
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_run, args=(arguments, err, prepare))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(arguments: list[str], err: Path, prepare: Callable[[], None]) -> None:
    # Tests started in the background of a shell ignore it, and so would their forks.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = err.open("w", buffering=1)
    prepare()
    os._exit(main(arguments))


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
