"""The temporary folder that the output is written to, and its removal when anything goes wrong.

A temporary sibling `.<name>.reap-partial-XXXX` holds the output until it is complete, flushed and
verified; then it gets its name in one step (`exchange` says how, where an old checkpoint has the
name). On any exception, Ctrl-C, SIGTERM or SIGHUP it is removed. After a kill -9 it stays behind.
The next run to the same target removes it, once it holds its lock: the file
`.<name>.reap-lock-XXXX` beside it, which its process held as long as it lived. Where a whole
checkpoint had the name before a run, one has it afterwards, the old or the new one, whatever ended
the run and whenever: at once, or when the next run to the same target has begun.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from reap_driver.base.interrupts import held_back, terminations_raised
from reap_driver.files.exchange import (
    Kind,
    discarded,
    exchange,
    hidden,
    lock_of,
    new_folder,
    restore,
)
from reap_driver.files.locks import locked
from reap_kernels.errors import CheckpointError, ResourceError
from reap_kernels.files import NO_SPACE, sync

# Names of a temporary folder that are tried until its lock is free.
_NAMES_TRIED = 10


def check_target(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuses a target that exists, or that is, contains or is inside the source.

    Raises:
        CheckpointError: naming the path and the way out.
    """
    target, origin = out.resolve(), source.resolve()
    if target == origin or origin in target.parents:
        raise CheckpointError(
            f"{out}: is the source or inside it ({source}); choose another folder."
        )
    if target in origin.parents:
        raise CheckpointError(f"{out}: contains the source {source}; choose another folder.")
    check_replaceable(out, overwrite=overwrite)


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuses a target that exists, unless it is a checkpoint that may be replaced.

    Raises:
        CheckpointError: naming the path and the way out.
    """
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(
            f"{out}: exists; choose another folder, or pass `overwrite=True` to replace it."
        )
    if out.is_symlink() or not out.is_dir():
        raise CheckpointError(
            f"{out}: is not a folder, so it is not replaced; choose another name."
        )
    if not (out / "config.json").is_file() and any(out.iterdir()):
        raise CheckpointError(
            f"{out}: holds files but no config.json, so it is not a checkpoint and is not "
            "replaced; "
            "choose another folder."
        )


@contextlib.contextmanager
def staged(out: Path, *, needed: int) -> Iterator[Path]:
    """A temporary sibling of `out`, removed unless the block ends normally and has renamed it.

    Raises:
        CheckpointError: the target's parent cannot be written.
        ResourceError: fewer than `needed` bytes are free, or the disk or a quota fills up on the
            way; nothing is left behind.
    """
    made = _make_parents(out.parent)
    folder, free = out, 0
    try:
        with terminations_raised(), _make_folder(out) as folder:
            free = _check_space(out, needed)
            yield folder
    except OSError as error:
        _remove_empty(made)
        where = str(error.filename or out).replace(str(folder), str(out))
        if error.errno in NO_SPACE:
            raise ResourceError(
                f"{where}: {error.strerror} while it was written: the disk is full, or a quota or "
                f"file size limit is reached ({needed} bytes are needed in all, {free} were free "
                "when it began); free some space or choose a folder on another disk. Nothing was "
                "left behind."
            ) from error
        raise CheckpointError(
            f"{where}: cannot be written ({error.strerror or error}); check the name, the rights "
            "of its folder, and that the disk is mounted for writing."
        ) from error
    except BaseException:
        _remove_empty(made)
        raise


def rehearse(out: Path, *, needed: int) -> None:
    """Raises what `staged` would raise at its beginning; leaves nothing behind."""
    made = [path for path in (out.parent, *out.parent.parents) if not path.exists()]
    with staged(out, needed=needed):
        pass
    _remove_empty(made)


def publish(folder: Path, out: Path, *, overwrite: bool) -> Path | None:
    """Flushes the finished folder to disk and gives it its final name.

    Returns:
        The old checkpoint, if it was replaced and cannot be removed; else None.

    Raises:
        CheckpointError: a target appeared that may not be replaced.
    """
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    check_replaceable(out, overwrite=overwrite)
    if not os.path.lexists(out):
        with held_back():
            folder.rename(out)
        sync(out.parent)
        return None
    exchange(folder, out)
    sync(out.parent)
    try:
        shutil.rmtree(folder)
    except OSError:  # the new checkpoint is there, and whole
        return folder
    return None


def clean_stale(out: Path) -> list[Path]:
    """Removes what killed runs to this target left behind, or puts a replaced checkpoint back.

    Folders of running processes are left alone; without locks on the file system, all are.

    Returns:
        The folders that were removed.

    Raises:
        CheckpointError: see `restore`.
    """
    restore(out)
    removed = [*_remove_stale(out, "partial"), *_remove_stale(out, "replaced")]
    for path in hidden(out, "lock"):  # of a run that was killed when it had no folder
        with contextlib.suppress(OSError), locked(path):
            pass  # which removes the file
    return removed


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` for files that a run needs temporarily; those of killed runs are
    removed.
    """
    _remove_stale(out, "scratch")
    with _make_folder(out, "scratch") as folder:
        yield folder


def _remove_stale(out: Path, kind: Kind) -> list[Path]:
    """Removes hidden folders whose runs have ended, except those that cannot be removed."""
    removed = []
    for path in hidden(out, kind):
        with contextlib.suppress(OSError), locked(lock_of(path, out)) as mine:
            if mine and path.is_dir():  # and not removed or renamed by its run meanwhile
                shutil.rmtree(path if kind == "scratch" else discarded(path, out))
                removed.append(path)
    return removed


@contextlib.contextmanager
def _make_folder(out: Path, kind: Kind = "partial") -> Iterator[Path]:
    """The temporary folder. Its lock is taken first, so no other run can find it unlocked. Without
    locks on the file system, no run removes folders of others; then it has no lock.
    """
    folder = new_folder(out, kind)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            for _ in range(_NAMES_TRIED):
                if stack.enter_context(locked(lock_of(folder, out))):
                    break
                # Another run that cleans up has locked the new file before this one could.
                folder = new_folder(out, kind)
        folder.mkdir()
        try:
            yield folder
        finally:
            # On success it has been renamed. If it cannot be removed, the next run tries again.
            shutil.rmtree(folder, ignore_errors=True)


def _check_space(out: Path, needed: int) -> int:
    """Refuses a target on a disk with less than `needed` bytes free; returns what is free."""
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise ResourceError(
            f"{out}: needs {needed} bytes, {free} are free there; free some space or choose a "
            "folder on another disk. Nothing was left behind."
        )
    return free


def _make_parents(parent: Path) -> list[Path]:
    """Creates missing parents of the target; returns those created, deepest first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{parent}: cannot be created ({error.strerror}); choose a folder you may write."
        ) from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Removes parents created for a run that failed, unless they hold something else by now."""
    for path in folders:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
