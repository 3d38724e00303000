"""Feeds changed inputs to readers and counts what becomes of them.

A reader ends well where it refuses with one error of the closed set, or accepts and what it made
can be used and makes sense. A traceback, a hang, or nonsense that is accepted is a fault; each is
kept with the seed that finds it again.
"""

import faulthandler
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import FrameType

from reap_kernels.errors import ReapError
from tests.fuzz.changes import Change

HANG_SECONDS = 20
_WAITING = 10  # times as long, where an input waits and computes nothing
_LONGEST_MESSAGE = 2_000


class Nonsense(Exception):
    """A reader accepted what makes no sense."""


class _Hang(BaseException):
    """A reader took too long."""


@dataclass(frozen=True)
class Reader:
    """One reader, and how inputs for it are made.

    Attributes:
        name: in the table.
        seeds: valid inputs, which must be accepted as they are.
        change: makes a changed input of a valid one.
        read: reads an input and uses what it was given; raises a ReapError where it refuses, or
            Nonsense where what was accepted makes no sense.
        share: inputs it gets, relative to others.
        odd: inputs that need not be valid, from which changed ones are made too.
    """

    name: str
    seeds: Sequence[bytes]
    change: Change
    read: Callable[[bytes], None]
    share: int = 1
    odd: Sequence[bytes] = ()


@dataclass
class Outcomes:
    """What became of the inputs of one reader; `faults` has a line per distinct fault."""

    refused: int = 0
    accepted: int = 0
    tracebacks: int = 0
    hangs: int = 0
    nonsense: int = 0
    slowest: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> int:
        """Inputs that ended in a fault."""
        return self.tracebacks + self.hangs + self.nonsense


def run(
    readers: Sequence[Reader],
    inputs: int,
    seed: int,
    *,
    shown: Callable[[str], None] = print,
    hang: float = HANG_SECONDS,
) -> dict[str, Outcomes]:
    """Feeds `inputs` inputs to the readers, shared out by their `share`.

    Args:
        shown: called with a line on each new fault.
        hang: seconds of computing that an input may take.
    """
    total = sum(reader.share for reader in readers)
    found = {}
    for reader in readers:
        outcomes = found[reader.name] = Outcomes()
        _check_seeds(reader, outcomes, shown)
        for number in range(max(1, inputs * reader.share // total)):
            _one(reader, f"{reader.name}:{seed}:{number}", outcomes, shown, hang)
    return found


def again(readers: Sequence[Reader], case: str) -> None:
    """Runs one input of a reader, `name:seed:number`, letting its exception through."""
    reader = next(one for one in readers if one.name == case.partition(":")[0])
    reader.read(_input(reader, case))


def table(found: dict[str, Outcomes]) -> str:
    """Readers x outcomes, with a line of sums."""
    names = ("refused", "accepted", "tracebacks", "hangs", "nonsense")
    lines = [f"{'reader':<28}" + "".join(f"{name:>11}" for name in names) + f"{'slowest':>10}"]
    for name, one in found.items():
        counts = "".join(f"{getattr(one, kind):>11}" for kind in names)
        lines.append(f"{name:<28}{counts}{one.slowest:>9.2f}s")
    sums = (sum(getattr(one, kind) for one in found.values()) for kind in names)
    lines.append(f"{'all':<28}" + "".join(f"{count:>11}" for count in sums))
    return "\n".join(lines)


def _input(reader: Reader, case: str) -> bytes:
    rng = Random(case)
    return reader.change(rng.choice([*reader.seeds, *reader.odd]), rng)


def _check_seeds(reader: Reader, outcomes: Outcomes, shown: Callable[[str], None]) -> None:
    """A valid input that is refused is a fault, and would make a campaign blind."""
    for number, seed in enumerate(reader.seeds):
        try:
            reader.read(seed)
        except (ReapError, Nonsense) as error:
            outcomes.nonsense += 1
            fault = f"valid-{reader.name}-{number} is refused: {error}"
            _record(outcomes, fault, f"{reader.name} seed {number}", shown)


def _one(
    reader: Reader, case: str, outcomes: Outcomes, shown: Callable[[str], None], hang: float
) -> None:
    content = _input(reader, case)
    began = time.monotonic()
    try:
        with _limited(hang):
            reader.read(content)
        outcomes.accepted += 1
    except ReapError as error:
        outcomes.refused += 1
        if fault := _bad_message(str(error)):
            outcomes.tracebacks += 1
            _record(outcomes, f"message {fault}", case, shown)
    except _Hang as error:
        outcomes.hangs += 1
        _record(outcomes, _place(error, "hang"), case, shown)
    except Nonsense as error:
        outcomes.nonsense += 1
        _record(outcomes, f"nonsense: {error}", case, shown)
    except Exception as error:  # noqa: BLE001  whatever else comes is what is looked for
        outcomes.tracebacks += 1
        _record(outcomes, _place(error, f"{type(error).__name__}: {error}"), case, shown)
    outcomes.slowest = max(outcomes.slowest, time.monotonic() - began)


def _bad_message(text: str) -> str | None:
    """What is wrong with an error message, if anything is."""
    if not text.strip() or len(text) > _LONGEST_MESSAGE:
        return f"of {len(text)} characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "that cannot be printed"
    return None


def _place(error: BaseException, what: str) -> str:
    """Where in the project's code an exception came from, which tells faults apart."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/reap_" in frame.filename] or frames
    last = own[-1]
    return f"{last.filename.rpartition('/reap_')[2]}:{last.lineno} {what[:150]}"


def _record(outcomes: Outcomes, fault: str, case: str, shown: Callable[[str], None]) -> None:
    kind = fault.partition(" ")[0]
    if kind not in outcomes.faults:
        outcomes.faults[kind] = f"{fault} [{case}]"
        shown(f"  {outcomes.faults[kind]}")


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends what takes too long; what does not even answer a signal ends the process."""

    def ring(_: int, __: FrameType | None) -> None:
        raise _Hang

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, ring) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of this process: others may share its cores
    signal.setitimer(signal.ITIMER_REAL, _WAITING * seconds)
    faulthandler.dump_traceback_later(2 * _WAITING * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
