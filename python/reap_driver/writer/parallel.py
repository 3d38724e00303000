"""Writes the output's shards by several threads, which the calling thread hears from and stops.

Only the calling thread runs the caller's progress function and receives signals; the others copy.
The first thing that goes wrong anywhere is what the caller gets, after every thread has ended:
each looks up at the latest when it has copied its next 16 MiB. (A second Ctrl-C ends the wait
for a disk that hangs; such a thread finds its file removed.)
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from reap_driver.writer.stream import OutShard, Progress, write_shard
from reap_kernels.errors import PlanError

# Streams that share a disk, so cores do not count: copying is the kernel's work and mostly waiting.
# Network disks and SSDs serve a few requests at once faster than one after the other; a spinning
# disk seeks between streams, but only every 16 MiB, and many streams would gain nothing more.
DEFAULT_THREADS = 4

_Event = int | Future[int]  # bytes written since the last event, or a shard that is done


class _Stopped(Exception):
    """Ends a thread whose work is no longer wanted. Never leaves this module."""


def check_threads(threads: int | None) -> None:
    """Refuse what is not a number of threads.

    Raises:
        PlanError: `threads` is neither None nor a positive integer.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise PlanError(
            f"threads {threads!r}: give a positive number of threads, or None for at most "
            f"{DEFAULT_THREADS}."
        )


def write_shards(
    folder: Path, shards: Sequence[OutShard], progress: Progress, threads: int | None = None
) -> int:
    """Write all files. Returns their size in bytes, which no number of threads changes.

    Args:
        folder: to write into.
        shards: one file each; a file is written by one thread.
        progress: called in this thread only.
        threads: at most so many files are written at once; None: `DEFAULT_THREADS`.
    """
    stopped = threading.Event()
    events: SimpleQueue[_Event] = SimpleQueue()

    def report(count: int) -> None:
        if stopped.is_set():
            raise _Stopped
        events.put(count)

    def finish(future: Future[int]) -> None:
        events.put(future)  # before others see the flag: the first error is the first event
        if not future.cancelled() and future.exception() is not None:
            stopped.set()

    with ThreadPoolExecutor(threads or DEFAULT_THREADS, "reap-writer") as pool:
        try:
            for shard in shards:
                pool.submit(write_shard, folder, shard, report).add_done_callback(finish)
            return _listen(events, len(shards), progress)
        except BaseException:  # Ctrl-C and SIGTERM too: the threads must end before the clean-up
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _listen(events: SimpleQueue[_Event], shards: int, progress: Progress) -> int:
    """Pass counts on until all shards are done; returns their bytes, raises the first error."""
    written = 0
    while shards:
        batch = [events.get()]
        while not events.empty():  # a slow progress function gets fewer calls, not late ones
            batch.append(events.get())
        done = [event for event in batch if not isinstance(event, int)]
        written += sum(future.result() for future in done)
        shards -= len(done)
        if count := sum(event for event in batch if isinstance(event, int)):
            progress(count)
    return written
