"""Runs checks of a GPU, in processes, and says in a row what each came to.

Nearly all of their time is the compilation of kernels, so that several processes share it. A check
that ends its process, or after which the device refuses all further work of that process (an
illegal access), is the only one that fails: the next one gets a new process. Processes import no
more than this module and what their checks need.
"""

import contextlib
import multiprocessing
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import torch

from bench.gpu.clock import Deadline
from bench.gpu.verify import outcome_of
from tests.gpu.checks import Check

# Seconds that checks which began before the deadline may still take, and that a process has to end
# by itself once it answers no more.
_GRACE, _DYING = 45.0, 5.0

Row = dict[str, object]


def outcome(check: Check, device: torch.device, deadline: Deadline) -> Row:
    """The row of one check: pass, failed, refused (a limit of the backend's) or skipped."""
    start = time.perf_counter()
    if deadline.passed():
        result, detail = "skipped", deadline.reason
    else:
        try:
            result, detail = "pass", check.run(device, check.backend, check.dtype, *check.arguments)
        except Exception as error:  # noqa: BLE001  whatever a kernel or a compiler does is red
            result, detail = outcome_of(error, check.backend, device)
    return _row(check, result, detail, time.perf_counter() - start)


def _row(check: Check, result: str, detail: str, seconds: float) -> Row:
    return {
        "check": check.name,
        "backend": check.backend,
        "dtype": str(check.dtype).removeprefix("torch."),
        "result": result,
        "detail": detail,
        "seconds": f"{seconds:.2f}",
    }


def run(
    device: torch.device, checks: list[Check], deadline: Deadline, workers: int | None = None
) -> list[Row]:
    """Rows of all checks, in order.

    Args:
        device: where.
        checks: what to run.
        deadline: checks that have not begun by then are skipped.
        workers: processes; default none on the CPU, else three for four cores, at most 12.
    """
    if workers is None:
        several = max(1, min(12, 3 * (os.cpu_count() or 2) // 4))
        workers = 0 if device.type == "cpu" else several
    if not workers or not checks:
        return [outcome(check, device, deadline) for check in checks]
    rows: dict[int, Row] = {}
    pending = deque(enumerate(checks))
    own = [_Worker(device, deadline) for _ in range(min(workers, len(checks)))]
    with ThreadPoolExecutor(len(own)) as threads:
        try:
            for ended in [threads.submit(_drain, worker, pending, rows) for worker in own]:
                ended.result()
        finally:
            pending.clear()
            for worker in own:
                worker.close()
    return [rows[number] for number in range(len(checks))]


def _drain(worker: "_Worker", pending: deque[tuple[int, Check]], rows: dict[int, Row]) -> None:
    """Checks, as long as there are any, by one process after another."""
    while True:
        try:
            number, check = pending.popleft()
        except IndexError:  # another one took the last
            return
        rows[number] = worker.row(check)


class _Worker:
    """A process in which checks run, begun with the first and again where one left it unusable."""

    def __init__(self, device: torch.device, deadline: Deadline) -> None:
        self._device, self._deadline, self._closed = device, deadline, False
        self._child: multiprocessing.process.BaseProcess | None = None

    def row(self, check: Check) -> Row:
        """The row of a check, whose process may die or hang."""
        if self._closed or self._deadline.passed():
            return _row(check, "skipped", self._deadline.reason, 0.0)
        start = time.perf_counter()
        if self._child is None:
            self._begin()
        try:
            self._pipe.send(check)
            if not self._pipe.poll(max(0.0, self._deadline.left() + _GRACE)):
                self._end(dying=0.0)
                detail = f"it had no result {_GRACE} s after the deadline; it was killed"
                return _row(check, "failed", detail, time.perf_counter() - start)
            row, usable = self._pipe.recv()
        except (EOFError, OSError):
            detail = f"its process died with code {self._end()}"
            return _row(check, "failed", detail, time.perf_counter() - start)
        if not usable:
            self._end(dying=0.0)
        return dict(row)

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, self._device, self._deadline))
        self._child.start()
        theirs.close()

    def _end(self, dying: float = _DYING) -> int | None:
        """Ends the process, if it has not ended within some seconds; its exit code."""
        child, self._child = self._child, None
        if child is None:
            return None
        child.join(dying)  # one that is dying says with which code
        child.kill()
        child.join()
        return child.exitcode

    def close(self) -> None:
        """Ends the process, whatever it does; no check begins after that."""
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()


def _serve(pipe: Connection, device: torch.device, deadline: Deadline) -> None:
    """The process of a worker: checks in; rows out, each with whether another check can follow."""
    with contextlib.suppress(EOFError):
        while True:
            row = outcome(pipe.recv(), device, deadline)
            pipe.send((row, row["result"] != "failed" or usable(device)))


def usable(device: torch.device) -> bool:
    """Whether a device still works for this process; after some errors it never does again."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
