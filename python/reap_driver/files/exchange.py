"""Replaces a folder by another one, so that its name always refers to a complete folder.

On its usual file systems, Linux exchanges two names atomically (`renameat2`). Elsewhere (NFS, other
operating systems) there are two steps, during which signals are held back: the old folder is
renamed to `.<name>.reap-replaced-XXXX`, then the new one to `<name>`. After a kill -9 between them
no folder has the name; the hidden one, which is always complete, is renamed back by `restore`.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from reap_driver.base.interrupts import held_back
from reap_driver.files.locks import locked
from reap_kernels.errors import CheckpointError
from reap_kernels.files import exists, sync

Kind = Literal["partial", "replaced", "scratch", "lock"]
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SUFFIX = 8  # random characters at the end of hidden names, different for each run


def exchange(folder: Path, out: Path) -> None:
    """Exchanges the names of `out` and of `folder`, a hidden folder beside it.

    Raises:
        OSError: a rename failed. `out` is then the old or the new folder; or, if the old one could
            not be renamed back either, `restore` does it.
    """
    with held_back():
        if _exchanged(folder, out):
            return
        aside = folder.with_name(prefix(out, "replaced") + folder.name[-_SUFFIX:])
        try:
            out.rename(aside)
            folder.rename(out)
            discarded(aside, out)
        except OSError:
            if not os.path.lexists(out):
                aside.rename(out)
            raise


def place(part: Path, out: Path) -> None:
    """Renames a complete folder to its name; an older one of that name is removed.

    Raises:
        OSError: a rename failed.
    """
    old = new_folder(out, "replaced")
    with held_back():
        if os.path.lexists(out):
            out.rename(old)
        part.rename(out)
    sync(out.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def partial_of(out: Path, rank: str = "") -> Path:
    """Where the files of a folder are until it is complete, for folders filled file by file."""
    return out.with_name(f"{out.name}.partial{rank}")


def discarded(folder: Path, out: Path) -> Path:
    """Renames a hidden folder that is about to be removed: the new name marks it as incomplete."""
    return folder.rename(folder.with_name(prefix(out, "partial") + folder.name[-_SUFFIX:]))


def restore(out: Path) -> None:
    """Renames a replaced folder back to `out` if the run was killed before the new one was in
    place.

    Raises:
        CheckpointError: the file system has no locks, so it is unknown whether that run has ended.
    """
    aside = sorted(hidden(out, "replaced"), key=lambda path: path.stat().st_ctime_ns, reverse=True)
    if not aside or os.path.lexists(out):
        return
    with contextlib.ExitStack() as stack:
        try:
            mine = stack.enter_context(locked(lock_of(aside[0], out)))
        except OSError as error:
            raise CheckpointError(
                f"{out}: a run was killed while it replaced this checkpoint, which is complete in "
                f"{aside[0]}; give that folder its name back, or remove it, and start again"
            ) from error
        if mine and aside[0].is_dir() and not os.path.lexists(out):
            aside[0].rename(out)
            sync(out.parent)


def prefix(out: Path, kind: Kind) -> str:
    """Prefix of the names of the hidden folders beside `out`; random characters follow."""
    return f".{out.name}.reap-{kind}-"


def new_folder(out: Path, kind: Kind) -> Path:
    """A name for a new hidden folder beside `out`."""
    return out.with_name(prefix(out, kind) + secrets.token_hex(_SUFFIX // 2))


def lock_of(folder: Path, out: Path) -> Path:
    """The lock file of the run that made a hidden folder, whatever the folder's current kind."""
    return folder.with_name(prefix(out, "lock") + folder.name[-_SUFFIX:])


def hidden(out: Path, kind: Kind) -> Iterator[Path]:
    """Hidden folders beside `out` that belong to exactly that name, or their lock files."""
    is_folder = exists(out.parent) and out.parent.is_dir()
    pattern = re.compile(rf"{re.escape(prefix(out, kind))}[a-z0-9_]{{{_SUFFIX}}}")
    for path in sorted(out.parent.iterdir()) if is_folder else ():
        right = path.is_file() if kind == "lock" else path.is_dir()
        if pattern.fullmatch(path.name) and right and not path.is_symlink():
            yield path


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two names atomically; whether the system could."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:  # an old C library
        return False
    names = os.fsencode(one), os.fsencode(other)
    return function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
