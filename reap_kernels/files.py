"""Files that appear under their name only when they are complete, and files of tensors."""

import contextlib
import errno
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from reap_kernels.errors import UsageError

WINDOWS = sys.platform == "win32"
# Errors by which a disk, a quota or a limit says that it is full.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes a file's content, or a folder's entries, to disk.

    Windows flushes only what is open for writing, and opens no folders: a name that was given
    there is durable when the file system's own log is.
    """
    flags = os.O_RDWR if WINDOWS else os.O_RDONLY
    if WINDOWS and os.path.isdir(path):
        return
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a file; false for names that no file can have (too long, links in a
    loop), for which pathlib raises.
    """
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a file or folder; false where `is_file` does not raise either."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around the writing of a file: errors of the system that name no file name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary sibling to write, flushed to disk and renamed to `path` when the block ends.

    On any exception, Ctrl-C included, it is removed and `path` stays as it was. Errors of the
    system name `path`.

    Args:
        path: the final name; its folder must exist.

    Yields:
        Path of an empty file with the permissions the process gives new files.
    """
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"path is a {type(path).__name__}; give the name of a file")
    target = Path(path)
    if not target.name:  # "", "." or "/"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(target))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with named(target):
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # writers that replace the file make it private
            sync(temporary)
            temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == os.fspath(temporary):
            error.filename = os.fspath(target)  # the name that the caller knows
        raise


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the disk refused, with its number, which the library has in its text alone.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), os.fspath(path)) from error
