"""Locks between processes, released when the process that holds them ends, however it ends."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Try to hold the lock of a file, without waiting.

    Args:
        path: the lock file, made here and removed afterwards. One that a killed process left behind
            is free.

    Yields:
        Whether this process holds it; False where another one does.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    # The library would otherwise replace a missing flock by a file that outlives a killed process.
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        try:
            # While the lock is held: whoever opened the file before finds that it has no name.
            with contextlib.suppress(PermissionError):  # Windows: no file that is open is removed
                path.unlink(missing_ok=True)
        finally:
            lock.release()
