"""What a command tells a human: results on stdout, progress and notes on stderr."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reap_driver.base.units import short

_SILENT = 2.0  # seconds before progress shows: what is quicker needs none
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Where stderr is no terminal: a line for each tenth of the work, or each minute.
_SHORTEST, _LONGEST = 5.0, 60.0


class Console:
    """Where a command's words go.

    Args:
        quiet: errors only.
        as_json: results are printed as JSON by the caller, so `say` keeps silent.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json

    def speaks(self, *, first: bool) -> None:
        """Of several processes that do the same, only the first speaks."""
        self.quiet = self.quiet or not first

    def say(self, text: str) -> None:
        """A result, on stdout."""
        if not self.quiet and not self.as_json:
            emit(text)

    def note(self, text: str) -> None:
        """Something to know that is no error, on stderr."""
        if not self.quiet:
            print(f"note: {printable(text)}", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, what: str, unit: str, total: int | None = None) -> Iterator["Progress"]:
        """Progress of one step, with its rate and the time left; a bar on a terminal, else lines.

        Args:
            what: the step.
            unit: of the counts, such as "tok" or "B".
            total: where it ends, None if unknown.
        """
        progress = Progress(what, unit, total, shown=not self.quiet)
        try:
            yield progress
        finally:
            progress.close()

    @contextmanager
    def library_progress(self) -> Iterator[None]:
        """transformers' own loading bars: on a terminal only, and not when quiet."""
        from transformers.utils import logging

        hide = (self.quiet or not sys.stderr.isatty()) and logging.is_progress_bar_enabled()
        if hide:
            logging.disable_progress_bar()
        try:
            yield
        finally:
            if hide:
                logging.enable_progress_bar()


class Progress:
    """Counts work done and shows it now and then."""

    def __init__(self, what: str, unit: str, total: int | None, *, shown: bool) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._done = self._skipped = 0.0
        self._began = self._said = time.monotonic()
        self._tenth = 0
        self._bar: Any = None
        self._lines = shown and not sys.stderr.isatty()
        if shown and not self._lines:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=what, unit=unit, unit_scale=True, delay=_SILENT, leave=False
            )

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def skip(self, count: float) -> None:
        """`count` were done before: they count as done, not towards the rate."""
        self._done += count
        self._skipped += count
        if self._bar is not None:
            self._bar.initial = count
            self._bar.update(count)

    def add(self, count: float) -> None:
        """`count` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._lines:
            self._maybe_line()

    def reach(self, done: int, total: int) -> None:
        """`done` of `total` are done: for work that counts itself."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total
        self.add(done - self._done)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()

    def _maybe_line(self) -> None:
        now = time.monotonic()
        tenth = int(10 * self._done // self._total) if self._total else 0
        waited = now - self._said
        due = tenth > self._tenth and waited > _SHORTEST
        first = self._said == self._began
        if waited > _LONGEST or due or (first and waited > _SILENT):
            self._said, self._tenth = now, tenth
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = (self._done - self._skipped) / self.seconds
        text = f"{self._what}: {short(self._done)}{self._unit}, {short(rate)}{self._unit}/s"
        if self._total:
            left = (self._total - self._done) / rate if rate else 0
            share = int(100 * self._done // self._total)
            text += f", {share} % of {short(self._total)}{self._unit}, {clock(left)} left"
        return text


def emit(text: str) -> None:
    """Prints a result on stdout; when its reader has gone (`| head`), the work still goes on.

    Characters that stdout cannot write (it may be ASCII) are written as escapes.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """A text without characters that command a terminal, which names from elsewhere may hold."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def clock(seconds: float) -> str:
    """75 as 1:15, 4000 as 1:06:40."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
