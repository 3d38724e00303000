"""Digests of the files that an interrupted run goes on from."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from reap_kernels.documents import Format, open_file


def digests(folder: Path, parts: Iterable[Path]) -> dict[str, str]:
    """{name relative to the folder: `sha256:...`} of files, and of the files in folders.

    Args:
        folder: that all are below.
        parts: files, and folders of files.

    Raises:
        OSError: one cannot be read.
    """
    found = {}
    for part in parts:
        for path in sorted(part.iterdir()) if part.is_dir() else [part]:
            with open_file(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(folder).as_posix()] = f"sha256:{digest}"
    return found


def check_digests(
    kind: Format, folder: Path, recorded: Mapping[str, str], parts: Iterable[Path]
) -> None:
    """Raises the error of a format unless `digests` finds what was recorded."""
    try:
        found = digests(folder, parts)
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
        raise kind.refusal(error.filename or folder, why) from error
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            why = "is missing" if name not in found else "is damaged, or of another run"
            raise kind.refusal(folder / name, why)
