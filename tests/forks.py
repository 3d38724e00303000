"""Functions in forks of this process: processes of their own that have imported everything.

They show what a call in this process cannot: exit codes, kills, locks of another process, ranks. A
new interpreter imports torch and transformers for some seconds first; a fork starts at once.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO, Any

from tests.limits import HUNG

_CONTEXT = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, or minus the number of the signal that ended it.
        out: what it wrote to stdout, its children included.
        err: what it wrote to stderr, its children included.
    """

    code: int
    out: str
    err: str


class Fork:
    """A function in a fork, which begins at once; a context that kills it if it is left early.

    Args:
        call: runs in the fork with one end of a pipe; returns the exit code, or None for 0.

    Attributes:
        pipe: the other end of it, for what the two have to tell each other.
        pid: number of the process.
    """

    def __init__(self, call: Callable[[Connection], int | None]) -> None:
        self._open = contextlib.ExitStack()
        self._out, self._err = (self._open.enter_context(_file()) for _ in range(2))
        ours, theirs = _CONTEXT.Pipe()
        self.pipe = self._open.enter_context(ours)
        self._process = _CONTEXT.Process(target=self._run, args=(call, theirs))
        self._process.start()
        theirs.close()  # so that a read from a fork that has ended fails instead of waiting
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def __enter__(self) -> "Fork":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._open.close()

    def _run(self, call: Callable[[Connection], int | None], pipe: Connection) -> None:
        self.pipe.close()
        # Tests started in the background of a shell ignore it, and so would their forks.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout, sys.stderr = _redirected(1, self._out), _redirected(2, self._err)
        sys.exit(call(pipe))

    def receive(self) -> Any:
        """What the fork sends through its pipe next; EOFError if it has ended."""
        assert self.pipe.poll(HUNG), "the fork hangs"
        return self.pipe.recv()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.exitcode is not None

    def end(self) -> Ended:
        """Waits for its end."""
        self._process.join(HUNG)
        code = self._process.exitcode
        assert code is not None, "the fork hangs"
        return Ended(code, _content(self._out), _content(self._err))


def forked(call: Callable[[], int | None]) -> Ended:
    """Runs a function in a fork to its end; it returns the exit code, or None for 0."""
    with Fork(lambda _: call()) as fork:
        return fork.end()


def _file() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _redirected(number: int, file: IO[bytes]) -> Any:
    """A text stream over a file descriptor that now leads to a file."""
    os.dup2(file.fileno(), number)
    return open(number, "w", encoding="utf-8", buffering=1, closefd=False)


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()
