"""Listeners: they receive notes, intermediate results and progress of a job while it runs."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from reap_driver.base.library_bars import no_library_bars


@dataclass(frozen=True)
class Progress:
    """How far one step of a job is.

    Attributes:
        step: what is being done, such as "observing".
        done: how much is done, in `unit`.
        total: where it ends; None if unknown.
        unit: such as "tok" or "B".
        seconds: since the step began.

    Example:
        >>> rd.Progress("observing", done=512, total=1024, unit="tok", seconds=2.0).step
        'observing'
    """

    step: str
    done: float
    total: int | None
    unit: str
    seconds: float


class Step:
    """Counts the work of one step; a subclass shows it."""

    def __init__(self, what: str, unit: str, total: int | None) -> None:
        self.what, self.unit, self.total = what, unit, total
        self.done = self.skipped = 0.0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def skip(self, count: float) -> None:
        """`count` were done before: they count as done, not towards the rate."""
        self.done += count
        self.skipped += count
        self.changed()

    def add(self, count: float) -> None:
        """`count` more are done; shares of the work add up to the whole but for rounding."""
        self.done += count
        if self.total is not None and math.isclose(self.done, self.total, rel_tol=1e-9):
            self.done = self.total
        self.changed()

    def reach(self, done: int, total: int) -> None:
        """`done` of `total` are done: for work that counts itself."""
        self.total = total
        self.add(done - self.done)

    def changed(self) -> None:
        """Called after each change."""

    def close(self) -> None:
        """Called at the end of the step, however it ends."""


class Listener:
    """Receives what a job reports while it runs. This one ignores it; `Console` prints it.

    Example:
        >>> class Lines(rd.Listener):
        ...     def say(self, text):
        ...         print(text)
        >>> planned = rd.plan(stats, 0.25, progress=Lines())
        plan by reap: keeps 24 of 32 experts in each of 4 layers
    """

    def only(self, speaks: bool) -> None:
        """Silences all but one of several processes that do the same."""

    def say(self, text: str) -> None:
        """A result, as soon as it is known; the job's result holds it, too."""

    def note(self, text: str) -> None:
        """A warning or remark; the job's result holds it, too."""

    def step(self, what: str, unit: str, total: int | None) -> Step:
        """A step that begins; a subclass returns one that shows its progress."""
        return Step(what, unit, total)

    @contextlib.contextmanager
    def progress(self, what: str, unit: str, total: int | None = None) -> Iterator[Step]:
        """Progress of one step.

        Args:
            what: the step.
            unit: of the counts, such as "tok" or "B".
            total: where it ends; None if unknown.
        """
        step = self.step(what, unit, total)
        try:
            yield step
        finally:
            step.close()

    def library_progress(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the libraries show no bars of their own."""
        return no_library_bars()


class _Told(Step):
    """A step that calls a function at every change."""

    def __init__(self, tell: Callable[[Progress], Any], what: str, unit: str, total: Any) -> None:
        super().__init__(what, unit, total)
        self._tell = tell

    def changed(self) -> None:
        """Calls the function."""
        self._tell(Progress(self.what, self.done, self.total, self.unit, self.seconds))


class Callback(Listener):
    """Calls a function with the progress of every step.

    Args:
        tell: called with a `Progress` after each batch, layer or file.
    """

    def __init__(self, tell: Callable[[Progress], Any]) -> None:
        self._tell = tell

    def step(self, what: str, unit: str, total: int | None) -> Step:
        """See `Listener`."""
        return _Told(self._tell, what, unit, total)


class Collector(Listener):
    """Passes everything on and keeps the notes, for a job's result."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener or Listener()
        self._notes: list[str] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """Those so far, in order."""
        return tuple(self._notes)

    def only(self, speaks: bool) -> None:
        """See `Listener`."""
        self._listener.only(speaks)

    def say(self, text: str) -> None:
        """See `Listener`."""
        self._listener.say(text)

    def note(self, text: str) -> None:
        """See `Listener`; what was noted before is not said again."""
        if text not in self._notes:
            self._notes.append(text)
            self._listener.note(text)

    def step(self, what: str, unit: str, total: int | None) -> Step:
        """See `Listener`."""
        return self._listener.step(what, unit, total)

    def library_progress(self) -> contextlib.AbstractContextManager[None]:
        """See `Listener`."""
        return self._listener.library_progress()
