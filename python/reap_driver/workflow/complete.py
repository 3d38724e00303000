"""Outputs that are complete already: what `resume='auto'` does where nothing is left to do.

Statistics, and plans of `prune` and `search`, record what the command asked for that made them
(`run`), so a command that is started again can tell whether an output is its own.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.observation.resume_file import difference
from reap_driver.workflow.listener import Collector
from reap_driver.workflow.results import Result
from reap_kernels.documents import as_read
from reap_kernels.errors import CheckpointError, ReapError

Both = Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]]


@dataclass(frozen=True, repr=False)
class Complete(Result):
    """An output that this command had completed before; nothing was done.

    Attributes:
        out: the output.

    Example:
        >>> again = {"out": "half", "seq_len": 64, "resume": "auto"}
        >>> for _ in range(2):
        ...     done = rd.prune("MODEL", "code.jsonl:40", **again)
        >>> done.facts()
        {'out': 'half', 'complete': True}
    """

    out: Path

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        return {"out": str(self.out), "complete": True}

    def describe(self) -> str:
        """See `Result`."""
        return f"{self.out} is complete, made by this command; nothing to do"


def finished(out: Path, heard: Collector) -> Complete:
    """Says that nothing is left to do."""
    done = Complete(heard.notes, out)
    heard.say(done.describe())
    return done


def made_by(out: Path, both: Both, *, overwrite: bool) -> bool:
    """Whether an output is there, and was made by the command that is given now.

    Args:
        out: the output.
        both: reads it, and gives what it records of the command that made it, and what the command
            asks for that is given now.
        overwrite: whether an output of another command is to be replaced.

    Returns:
        False where there is none, or one that is to be replaced.

    Raises:
        CheckpointError: another command made it; names what differs.
        ReapError: it cannot be read.
    """
    if not os.path.lexists(out):
        return False
    try:
        recorded, now = both()
    except ReapError:
        if overwrite:
            return False
        raise
    differs = difference(recorded, as_read(dict(now)))
    if differs is None or overwrite:
        return differs is None
    why = f"was made by another command: {differs}" if recorded else "does not record what made it"
    raise CheckpointError(
        f"{out}: exists, and {why}; choose another name, or pass `overwrite=True`"
    )
