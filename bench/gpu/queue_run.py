"""Runs the queue within a budget: what fits, in order, in a process of its own that may die.

Rows are written after each item, so that whatever ends a run loses one item at most. An item that
fails, hangs or takes its process along does not keep the next one from running: that one gets a new
process, with a new context on the device.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.gpu.clock import Deadline
from bench.gpu.machine import Machine, survey
from bench.gpu.queue import At, Item, Row
from bench.gpu.selection import PLANNED, Selection

STAGE = "queue"
# Seconds for what comes before the first item: a process, and the machine's peaks.
_BEGINNING = 20.0
_BEGINS_WITHIN = 180.0
# An item may take so many times its estimate; if it has not ended so long after, it is killed.
_STRETCH, _GRACE = 2.0, 50.0

# What a row says that found nothing out, or nothing good; the first of them is quoted.
_NOT_RIGHT = ("failed", "wrong", "refused", "skipped")

Write = Callable[[str, dict[str, str], list[Row]], None]


class Lost(Exception):
    """An item gave no rows: it raised, or its process died or hung; the message says which."""


@dataclass(frozen=True)
class Options:
    """What the process of the items must know; see `bench.gpu.command`."""

    device: torch.device
    smoke: bool
    commit: str | None = None
    folder: Path | None = None
    selection: Selection = PLANNED


def plan(items: Sequence[Item], budget: float) -> str:
    """What will run, in order, and what only if others take less than they are thought to."""
    total = sum(item.seconds for item in items)
    lines = [f"queue: {len(items)} items, about {total:.0f} s; {budget:.0f} s to spend"]
    left = budget - _BEGINNING
    for item in items:
        fits = item.seconds <= left
        left -= item.seconds if fits else 0
        note = "" if fits else "  (only if others take less)"
        lines.append(f"  {item.seconds:4.0f} s  {item.name:18} {item.answers[0]}{note}")
    return "\n".join(lines)


def run(items: Sequence[Item], budget: float, options: Options, write: Write) -> list[Row]:
    """A row of each item: pass, failed, partly (the time ended it), skipped or not reached.

    Args:
        items: in the order in which they run.
        budget: seconds for all; an item is not begun where the rest does not hold its estimate.
        options: what their process must know.
        write: takes a stage, the machine's facts, and rows, as soon as there are any.

    Raises:
        Lost: no process could begin; nothing was run.
    """
    end = Deadline(budget)
    outcomes = []
    with contextlib.closing(_Process(options)) as process:
        for item in items:
            start, left = time.perf_counter(), end.left()
            if item.seconds > left:
                detail = f"about {item.seconds:.0f} s, of which {max(0, left):.0f} are left"
                found: tuple[str, list[Row], str] = ("not reached", [], detail)
            else:
                found = _outcome(item, process, min(left, _STRETCH * item.seconds))
            result, made, detail = found
            if made:
                write(item.stage, process.facts, made)
            row: Row = {"item": item.name, "answers": "; ".join(item.answers), "result": result}
            row |= {"about_s": f"{item.seconds:.0f}", "detail": detail}
            row["seconds"] = (
                f"{time.perf_counter() - start:.1f}" if made or result == "failed" else ""
            )
            outcomes.append(row)
            write(STAGE, process.facts, [row])
    return outcomes


def rest(outcomes: Sequence[Row]) -> list[str]:
    """Names of the items that stay in the queue."""
    return [str(row["item"]) for row in outcomes if row["result"] in ("not reached", "partly")]


def _outcome(item: Item, process: "_Process", seconds: float) -> tuple[str, list[Row], str]:
    """Result, rows and detail of one item."""
    try:
        made = process.rows(item, seconds)
    except Lost as error:
        return "failed", [], str(error)
    result, detail = judged(made)
    if result == "failed":
        process.end()  # an error on the device may outlast what met it
    return result, made, detail


def judged(made: Sequence[Row]) -> tuple[str, str]:
    """Result and detail of an item by its rows.

    It is `partly` where the deadline cut something off, also of a row with figures, and `skipped`
    where nothing ran, since all rows are skipped or refused.
    """
    found = [
        (str(row["result"]), str(row["detail"]))
        if "result" in row
        else (str(row["status"]), str(row["note"]))
        for row in made
    ]
    counts = Counter(what for what, _ in found)
    detail = ", ".join(f"{number} {what}" for what, number in sorted(counts.items())) or "no rows"
    notes = [note for worst in _NOT_RIGHT for what, note in found if what == worst]
    if notes:
        detail += f": {notes[0][:300]}"
    if counts["failed"] or not made:
        return "failed", detail
    if any(Deadline(0).reason in note for _, note in found):
        return "partly", detail
    return ("pass" if set(counts) - set(_NOT_RIGHT) else "skipped"), detail


class _Process:
    """The process in which items run, begun again where it was lost.

    Attributes:
        facts: the columns every row begins with.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._machine: Machine | None = None
        self._begin()
        assert self._machine is not None
        self.facts = self._machine.facts

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, self._options, self._machine))
        self._child.start()
        theirs.close()
        self._machine = self._answer(_BEGINS_WITHIN)

    def rows(self, item: Item, seconds: float) -> list[Row]:
        """What an item finds.

        Raises:
            Lost: it raised, its process died, or it had no rows in time.
        """
        if not self._child.is_alive():
            self._begin()
        self._pipe.send((item, seconds))
        return self._answer(seconds + _GRACE)

    def _answer(self, seconds: float) -> object:
        try:
            if not self._pipe.poll(seconds):
                self.end()
                raise Lost(f"no result {_GRACE:.0f} s after its time was over; it was killed")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._child.join()
            code = self._child.exitcode
            self.end()
            raise Lost(f"its process died with code {code}") from None
        if isinstance(answer, Lost):
            self.end()
            raise answer
        return answer

    def end(self) -> None:
        """Kills the process and those it began; the next item begins a new one."""
        if self._child.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
        self._child.kill()
        self._child.join()

    close = end


def _serve(pipe: Connection, options: Options, machine: Machine | None) -> None:
    """The process of the items: items in, rows out."""
    os.setsid()  # so that a kill reaches the processes that items begin
    try:
        machine = machine or survey(options.device, options.smoke, options.commit)
        pipe.send(machine)
        while True:
            item, seconds = pipe.recv()
            at = At(machine, Deadline(seconds), options.folder, options.selection)
            pipe.send(_attempt(item, at))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  the process that waits says it
        pipe.send(Lost(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))


def _attempt(item: Item, at: At) -> list[Row] | Lost:
    try:
        return item.run(at)
    except Exception as error:  # noqa: BLE001  whatever a kernel or a compiler does is red
        return Lost(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
