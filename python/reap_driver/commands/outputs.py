"""Checks of output files, made before any work is done."""

import os
from collections.abc import Sequence
from pathlib import Path

from reap_kernels.errors import CheckpointError


def check_file(path: Path, *, overwrite: bool) -> None:
    """Refuses an output file that exists, or that cannot be written.

    Raises:
        CheckpointError: naming the path and the way out.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give the name of a file to write")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: exists; choose another name, or pass --overwrite")
    if not folder.is_dir():
        raise CheckpointError(f"{path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"{path}: the folder {folder} cannot be written; choose another")


def check_folder(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Refuses a folder for several files that cannot be made or written, or that holds one of them.

    Raises:
        CheckpointError: naming the path and the way out.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the name of a folder")
    existing = folder if folder.exists() else folder.absolute().parent
    if not existing.is_dir():
        raise CheckpointError(f"{folder}: the folder {existing} does not exist; make it first")
    if not os.access(existing, os.W_OK):
        raise CheckpointError(f"{folder}: the folder {existing} cannot be written; choose another")
    for name in names:
        if (folder / name).exists() and not overwrite:
            raise CheckpointError(
                f"{folder / name}: exists; choose another folder, or pass --overwrite"
            )
