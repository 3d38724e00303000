"""Locks between processes, released when the process that holds them ends, however it ends."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Tries to lock a file, without waiting.

    Args:
        path: the lock file, which is created here and removed afterwards. If a killed process left
            it behind, it is not locked.

    Yields:
        True if this process has the lock, False if another one has it.

    Raises:
        OSError: the file cannot be created, or its file system has no locks.
    """
    # By default the library falls back to a lock file that stays when the process is killed.
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
            # Before releasing the lock: a process that has the file open finds that it has no name.
            with contextlib.suppress(PermissionError):  # Windows does not remove open files
                path.unlink(missing_ok=True)
        finally:
            lock.release()
