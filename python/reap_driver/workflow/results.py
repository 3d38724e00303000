"""What every job's result has: facts for machines, words for people, the same in a notebook."""

import html
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class Result(ABC):
    """The outcome of a job.

    Attributes:
        notes: warnings and remarks of the job until then, in order.
    """

    notes: tuple[str, ...]

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The outcome as the command line's `--json` prints it."""

    @abstractmethod
    def describe(self) -> str:
        """The outcome in a few lines."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.describe()}"

    def _repr_html_(self) -> str:
        """The outcome in words, and the notes, which notebooks show."""
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<pre>{html.escape(self.describe())}</pre>{notes}"
