"""A file that several threads read, each at places of its own."""

import os
import threading
from pathlib import Path
from typing import BinaryIO

from reap_driver.files.fingerprints import Fingerprints


class SharedFile:
    """A file that is open for reading.

    Args:
        path: of the file.
        fingerprints: of files when they were inspected; the file is checked when it is opened.

    Raises:
        CheckpointError: the file cannot be read, or has changed.
    """

    def __init__(self, path: Path, fingerprints: Fingerprints) -> None:
        self._file: BinaryIO = fingerprints.open(path)
        self._lock = threading.Lock()

    def read_into(self, view: memoryview, start: int) -> int:
        """Fills the beginning of `view` from byte `start` on; returns how many bytes it read.

        Raises:
            OSError: the system cannot read.
        """
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        with self._lock:  # Windows: the position belongs to the file, so threads take turns
            self._file.seek(start)
            return self._file.readinto(view)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
