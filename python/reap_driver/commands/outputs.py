"""Checks of output files, made before any work is done."""

import os
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
