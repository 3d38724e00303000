"""The folder that is written before it gets its final name, and what happens to it when anything
goes wrong.

A temporary sibling `.<name>.reap-partial-XXXX` holds the output until it is complete, flushed and
verified; then one rename gives it its name. On any exception, Ctrl-C or SIGTERM it is removed.
After a kill -9 it stays behind; the next run to the same target recognises it by its lock, which
dies with its process, and removes it.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from reap_kernels.errors import CheckpointError, ResourceError
from reap_kernels.files import NO_SPACE, sync


def check_target(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists, or that is, holds or lies inside the source.

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
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(
            f"{out}: exists; choose another folder, or pass overwrite=True (--overwrite) to "
            "replace it."
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
    try:
        with _terminations_raised(), _make_folder(out) as folder:
            _check_space(out, needed)
            yield folder
    except OSError as error:
        _remove_empty(made)
        if error.errno in NO_SPACE:
            raise _no_space(out, needed, shutil.disk_usage(_existing(out.parent)).free) from error
        raise CheckpointError(
            f"{error.filename or out}: cannot be written ({error.strerror or error}); "
            "check permissions and that the disk is mounted for writing."
        ) from error
    except BaseException:
        _remove_empty(made)
        raise


def rehearse(out: Path, *, needed: int) -> None:
    """Raise what `staged` would raise at its beginning; leaves nothing behind."""
    made = [path for path in (out.parent, *out.parent.parents) if not path.exists()]
    with staged(out, needed=needed):
        pass
    _remove_empty(made)


def publish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Flush the finished folder to disk and give it its final name.

    An old target is set aside as `.<name>.reap-replaced-XXXX` first and removed last; after a kill
    between the two renames, that is where it is found.
    """
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    old: Path | None = None
    if overwrite and out.is_dir():
        old = folder.with_name(folder.name.replace("partial", "replaced"))
        out.rename(old)
    elif os.path.lexists(out):
        raise CheckpointError(f"{out}: appeared while it was written; choose another folder.")
    try:
        folder.rename(out)
    except OSError:
        if old is not None:
            old.rename(out)
        raise
    sync(out.parent)
    if old is not None:
        shutil.rmtree(old)


def clean_stale(out: Path) -> list[Path]:
    """Remove what a killed run to this target left behind. Folders of runs still alive are left
    alone.
    """
    removed = []
    for path in out.parent.glob(f".{out.name}.reap-partial-*") if out.parent.is_dir() else ():
        if path.is_symlink() or not path.is_dir():
            continue
        with _locked(path) as locked:
            if locked:
                shutil.rmtree(path)
                removed.append(path)
    return removed


@contextlib.contextmanager
def _make_folder(out: Path) -> Iterator[Path]:
    """The locked temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.reap-partial-", dir=out.parent))
    try:
        folder.chmod(
            0o777 & ~_umask()
        )  # mkdtemp is private; the result should be as mkdir makes it
        with _locked(folder):
            yield folder
    finally:
        if folder.exists():  # renamed away on success
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Try to hold the lock of a folder, which ends with the process. False: taken, or the file
    system has no locks.

    Without locks nothing is ever taken for a leftover, so nothing is removed by mistake.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _terminations_raised() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that the clean-up above runs. Main thread
    only.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread, which owns their handling
        return
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_space(out: Path, needed: int) -> None:
    """Refuse when the file system of the target cannot hold `needed` bytes."""
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise _no_space(out, needed, free)


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents of the target; returns those created, deepest first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{parent}: cannot be created ({error.strerror}); choose a folder you may write."
        ) from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Remove parents created for a run that failed, unless something else was put there."""
    for path in folders:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _existing(path: Path) -> Path:
    """The nearest folder that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _no_space(out: Path, needed: int, free: int) -> ResourceError:
    """The disk, or a quota or limit below its size, is full."""
    return ResourceError(
        f"{out}: needs {needed} bytes, {free} are free there (or a quota or file size limit is "
        "lower); "
        "free some space or choose a folder on another disk. Nothing was left behind."
    )


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
