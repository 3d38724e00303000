"""Locks of folders, released when the process that holds them ends, however it ends."""

import contextlib
import enum
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class Lock(enum.Enum):
    """The result of trying to lock a folder."""

    MINE = enum.auto()
    TAKEN = enum.auto()  # another running process holds it
    UNKNOWN = enum.auto()  # the file system has no locks, or the folder cannot be opened
    GONE = enum.auto()  # the folder was removed or renamed in the meantime


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Tries to lock a folder, without waiting. The lock stays with the folder if it is renamed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield Lock.GONE
        return
    except PermissionError:  # another user's folder
        yield Lock.UNKNOWN
        return
    try:
        yield _lock(descriptor, folder)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> Lock:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.TAKEN
    except OSError:
        return Lock.UNKNOWN
    try:
        return Lock.MINE if os.path.samestat(os.fstat(descriptor), folder.stat()) else Lock.GONE
    except FileNotFoundError:
        return Lock.GONE
