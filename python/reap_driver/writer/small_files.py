"""Copies the files of a checkpoint that are not weights, and adds up what was written."""

import shutil
from collections.abc import Callable
from pathlib import Path

from reap_driver.files.checkpoint import Checkpoint
from reap_kernels.files import named


def copy_file(source: Checkpoint, path: Path, folder: Path, progress: Callable[[int], None]) -> int:
    """Copies a file, and checks that it is the one that was inspected; returns its size in bytes.

    Args:
        source: the checkpoint.
        path: relative to its folder.
        folder: to copy to, under the same path.
        progress: called with bytes written.
    """
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        source.fingerprints.open(source.folder / path) as file,
        named(target),
        target.open("xb") as copy,
    ):
        shutil.copyfileobj(file, copy)
    size = target.stat().st_size
    progress(size)
    return size


def counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Adds up byte counts for the caller's progress function."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    return add
