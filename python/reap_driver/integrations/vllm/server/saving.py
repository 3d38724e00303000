"""Saves statistics on the server, into the one folder that was named at its start."""

import os
import re
from pathlib import Path

from reap_driver.integrations.vllm.server.refusals import Refused
from reap_kernels import SaliencyStats
from reap_kernels.errors import UsageError
from reap_kernels.files import NO_SPACE

VARIABLE = "REAP_STATS_FOLDER"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,180}\.safetensors")


class StatsFolder:
    """The folder that statistics may be saved in.

    Args:
        given: value of the environment variable REAP_STATS_FOLDER when the server started; None or
            empty for no such folder.

    Raises:
        UsageError: it is none that can be written to.

    Example:
        >>> StatsFolder(None).path is None
        True
    """

    def __init__(self, given: str | None) -> None:
        self.given = given
        self.path = Path(os.path.realpath(given)) if given else None
        if self.path is not None and not (self.path.is_dir() and os.access(self.path, os.W_OK)):
            raise UsageError(
                f"{VARIABLE} is {given}, which is no folder that this server can write to; make "
                "it, or start the server without the variable"
            )

    def target(self, name: str, *, overwrite: bool) -> Path:
        """Where statistics of a name go.

        Args:
            name: of the file, without any folder.
            overwrite: whether an older file of that name may be replaced.

        Raises:
            Refused: 400 for a name that is none, or is taken; 409 where there is no folder.
        """
        if self.path is None:
            raise Refused(
                409,
                f"this server saves no statistics: {VARIABLE} named no folder when it started; "
                "start it with that, or download them (GET /reap/stats)",
            )
        if not _NAME.fullmatch(name):
            raise Refused(
                400,
                f"field 'name' is {name!r}; expected the name of a file, of letters, digits, `_`, "
                "`.` and `-`, which ends in .safetensors, without a folder",
            )
        if not self.path.is_dir():
            raise Refused(
                409, f"{VARIABLE} names {self.given}, which is no longer a folder; make it again"
            )
        target = self.path / name
        if os.path.islink(target) or (os.path.lexists(target) and not target.is_file()):
            raise Refused(400, f"{name}: is no plain file in {self.given}; give another name")
        if target.exists() and not overwrite:
            raise Refused(
                400, f"{name}: exists in {self.given}; give another name, or `overwrite`: true"
            )
        return target

    def save(self, stats: SaliencyStats, name: str, *, overwrite: bool) -> Path:
        """Writes a file at once under its name; a failure leaves nothing there.

        Raises:
            Refused: see `target`; 507 where the disk is full, 409 where it refuses otherwise.
        """
        target = self.target(name, overwrite=overwrite)
        try:
            stats.save(target)
        except OSError as error:
            full = error.errno in NO_SPACE
            remedy = "free some" if full else f"make {self.given} writable"
            raise Refused(
                507 if full else 409,
                f"{name}: cannot be saved ({error.strerror or error}); {remedy}, or download the "
                "statistics (GET /reap/stats)",
            ) from error
        return target
