"""Gives a complete folder the name of another one, so that a whole folder has the name throughout.

Linux exchanges two names in one step (`renameat2`) on its usual file systems; then nothing, not
even a power failure, leaves the name without a folder. Elsewhere (NFS and others, other systems)
the old folder is renamed to `.<name>.reap-replaced-XXXX` and the new one to its name: two steps,
during which signals wait. A kill -9 between them leaves the name free; then that hidden folder,
which is complete whenever it is called so, is put back by `restore`.
"""

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from reap_driver.base.interrupts import held_back
from reap_driver.files.locks import Lock, locked
from reap_kernels.errors import CheckpointError
from reap_kernels.files import exists, sync

Kind = Literal["partial", "replaced", "scratch"]
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SUFFIX = 8  # characters, as `tempfile` makes them


def exchange(folder: Path, out: Path) -> None:
    """`folder`, a hidden sibling of `out`, and `out` change their names.

    Raises:
        OSError: `out` is one of the two, or, if that is impossible, `restore` puts it back.
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


def discarded(folder: Path, out: Path) -> Path:
    """A hidden folder that is about to be removed, under the name of one that may be incomplete."""
    return folder.rename(folder.with_name(prefix(out, "partial") + folder.name[-_SUFFIX:]))


def restore(out: Path) -> None:
    """Puts back what a run set aside that was killed before the new folder had the name.

    Raises:
        CheckpointError: the file system has no locks, so that nobody knows whether that run has
            ended.
    """
    aside = sorted(hidden(out, "replaced"), key=lambda path: path.stat().st_ctime_ns, reverse=True)
    if not aside or os.path.lexists(out):
        return
    with locked(aside[0]) as lock:
        if lock is Lock.UNKNOWN:
            raise CheckpointError(
                f"{out}: a run was killed while it replaced this checkpoint, which is complete in "
                f"{aside[0]}; give that folder its name back, or remove it, and start again"
            )
        if lock is Lock.MINE and not os.path.lexists(out):
            aside[0].rename(out)
            sync(out.parent)


def prefix(out: Path, kind: Kind) -> str:
    """The beginning of the names of hidden siblings; `_SUFFIX` random characters follow."""
    return f".{out.name}.reap-{kind}-"


def hidden(out: Path, kind: Kind) -> Iterator[Path]:
    """Hidden siblings that belong to this very name."""
    is_folder = exists(out.parent) and out.parent.is_dir()
    pattern = re.compile(rf"{re.escape(prefix(out, kind))}[a-z0-9_]{{{_SUFFIX}}}")
    for path in sorted(out.parent.iterdir()) if is_folder else ():
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            yield path


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the system exchanged the names; it does so entirely or not at all."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
