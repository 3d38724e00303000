"""What every job's result has: facts for machines, words for people, a table in a notebook."""

import html
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from reap_driver.base.units import significant


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
        """The single values among the facts as a table, which notebooks show."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(key.replace('_', ' '))}</th>"
            f"<td>{html.escape(_shown(value))}</td></tr>"
            for key, value in self.facts().items()
            if isinstance(value, str | int | float)
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table>{rows}</table>{notes}"


def _shown(value: str | int | float) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else significant(value)
