"""A listener that prints: results on stdout, progress and notes on stderr."""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from reap_driver.base.library_bars import no_library_bars
from reap_driver.base.units import clock, short
from reap_driver.workflow import exchange_jobs, follow_up_jobs, jobs
from reap_driver.workflow.fields import every_field
from reap_driver.workflow.listener import Listener, Step

_SILENT = 2.0  # seconds before progress shows: what is quicker needs none
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Where stderr is no terminal: a line for each tenth of the work, or each minute.
_SHORTEST, _LONGEST = 5.0, 60.0


class Console(Listener):
    """Prints what a job reports.

    Args:
        quiet: errors only.
        as_json: the caller prints the result as JSON, so `say` prints nothing.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self._last: Shown | None = None

    def only(self, speaks: bool) -> None:
        """See `Listener`."""
        self.quiet = self.quiet or not speaks

    def say(self, text: str) -> None:
        """A result, on stdout."""
        if not self.quiet and not self.as_json:
            with self._above_bars():
                emit(flags(text))

    def note(self, text: str) -> None:
        """Something to know that is no error, on stderr."""
        if not self.quiet:
            with self._above_bars():
                print(f"note: {printable(flags(text))}", file=sys.stderr, flush=True)

    def step(self, what: str, unit: str, total: int | None) -> Step:
        """Progress with its rate and the time left: a bar on a terminal, else lines."""
        if self.quiet:
            return Step(what, unit, total)
        self._last = Shown(what, unit, total)
        return self._last

    def _above_bars(self) -> AbstractContextManager[None]:
        """Around what is printed while a bar may be on the screen."""
        return nullcontext() if self._last is None else self._last.hidden()

    def library_progress(self) -> AbstractContextManager[None]:
        """The libraries' own bars: on a terminal only, of one rank, and not when quiet."""
        first = os.environ.get("RANK", "0") == "0"
        shown = sys.stderr.isatty() and first and not self.quiet
        return nullcontext() if shown else super().library_progress()


class Shown(Step):
    """A step that shows its progress now and then, on stderr. Where it does so by a bar, the
    libraries show none.
    """

    def __init__(self, what: str, unit: str, total: int | None) -> None:
        super().__init__(what, unit, total)
        self._said = 0.0  # seconds after the beginning
        self._tenth = 0
        self._counted = 0.0  # that the bar has been told
        self._bar: Any = None
        self._alone = ExitStack()
        if sys.stderr.isatty():
            self._alone.enter_context(no_library_bars())
            self._bar = _bar(
                total=total, desc=what, unit=unit, unit_scale=True, delay=_SILENT, leave=False
            )

    def skip(self, count: float) -> None:
        """See `Step`."""
        if self._bar is not None:
            self._bar.initial = count
        super().skip(count)

    def changed(self) -> None:
        """Moves the bar, or prints a line where one is due."""
        if self._bar is None:
            self._maybe_line()
            return
        self._bar.total = self.total
        self._bar.update(self.done - self._counted)
        self._counted = self.done

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
        self._alone.close()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Takes the bar off the screen while something is printed; it is drawn again below."""
        bar = self._bar
        if bar is None or bar.disable or bar.last_print_t < bar.start_t + bar.delay:
            yield  # closed, or never drawn so far
            return
        bar.clear()
        yield
        bar.refresh()

    def _maybe_line(self) -> None:
        now = self.seconds
        tenth = int(10 * self.done // self.total) if self.total else 0
        waited = now - self._said
        due = tenth > self._tenth and waited > _SHORTEST
        first = self._said == 0
        if waited > _LONGEST or due or (first and waited > _SILENT):
            self._said, self._tenth = now, tenth
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = (self.done - self.skipped) / self.seconds
        text = f"{self.what}: {short(self.done)}{self.unit}, {short(rate)}{self.unit}/s"
        if self.total:
            left = (self.total - self.done) / rate if rate else 0
            share = int(100 * self.done // self.total)
            text += f", {share} % of {short(self.total)}{self.unit}, {clock(left)} left"
        return text


def _bar(**options: Any) -> Any:
    """A bar of tqdm that writes times as all messages do: tqdm's own has hours, however many."""
    from tqdm import tqdm

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            found: dict[str, Any] = super().format_dict
            done, passed, total = found["n"], found["elapsed"], found["total"]
            rate = found["rate"] or (done - found["initial"]) / passed if passed else 0
            left = clock(max(0, total - done) / rate) if total and rate > 0 else "?"
            return {**found, "passed": clock(passed), "left": left}

    # Shown even where the libraries' bars, which are tqdm's too, are turned off by its variable.
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{passed}<{left}, {rate_fmt}]"
    return Bar(bar_format=form, disable=False, **options)


def flags(text: str) -> str:
    """A text whose options are written as Python does, with the command line's flags.

    Example:
        >>> flags("`max_len=9`: only with `packing='none'`, or `journal=False`")
        '--max-len 9: only with --packing none, or --no-journal'
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name not in option_names():
            return found[0]
        word = name.rstrip("_").replace("_", "-")  # from_ is a word of Python
        if value in ("True", "False"):
            return f"--{word}" if value == "True" else f"--no-{word}"
        return f"--{word}" if value is None else f"--{word} {value.strip(chr(39))}"

    return re.sub(r"`(\w+)(?:=([^`]*))?`", flag, text)


@functools.cache
def option_names() -> frozenset[str]:
    """Names of the options of all jobs, but for those that have no flag."""
    named = {**vars(jobs), **vars(follow_up_jobs), **vars(exchange_jobs)}
    jobs_of = [one for one in named.values() if dataclasses.is_dataclass(one)]
    fields = [field for one in jobs_of for field in every_field(one)]  # type: ignore[arg-type]
    return frozenset(field.name for field in fields if not field.metadata["positional"])


def emit(text: str) -> None:
    """Prints a result on stdout; when its reader has gone (`| head`), the work still goes on.

    Characters that stdout cannot write (it may be ASCII) are written as escapes.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        # What is left in the buffer must not fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "standard output") from error


def printable(text: str) -> str:
    """A text without characters that command a terminal, which names from elsewhere may hold."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
