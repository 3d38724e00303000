"""Evaluates the candidates of a search, so that it can be interrupted and resumed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from reap_driver.base.interrupts import Stop
from reap_driver.plan_search.search_state import SearchState

_WRITE_AFTER = 30.0  # seconds between two writes of the state within a generation


@dataclass
class Recorder:
    """Evaluates candidates, saves their fitness periodically, and ends the search on request.

    Attributes:
        fitness: of a candidate, which a few integers name: its removals by layer, or its shape.
        state: the state file; None to save nothing.
        stop: the request to end the search.
        done: called after each evaluated candidate.
        known: fitness of every evaluated candidate, earlier runs included.
        seconds: duration of the earlier runs.
    """

    fitness: Callable[[tuple[int, ...]], float]
    state: SearchState | None = None
    stop: Stop = field(default_factory=Stop)
    done: Callable[[], Any] = lambda: None
    known: dict[tuple[int, ...], float] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._began = self._wrote = time.monotonic()
        self._written = len(self.known)

    def clock(self) -> float:
        """Seconds that the search has taken, earlier runs included."""
        return self.seconds + time.monotonic() - self._began

    def __call__(self, candidate: tuple[int, ...]) -> float:
        """The fitness of a candidate.

        Raises:
            Interrupted: the search was asked to end; the state is saved.
        """
        if candidate in self.known:
            return self.known[candidate]
        value = self.known[candidate] = self.fitness(candidate)
        self.done()
        if self.stop.requested or time.monotonic() - self._wrote > _WRITE_AFTER:
            self.write()
        if self.stop.requested:
            text = f"interrupted after {len(self.known)} candidates{self._remedy()}"
            raise self.stop.interrupted(text)
        return value

    def _remedy(self) -> str:
        """How to resume, if a state file is kept."""
        if self.state is None:
            return ""
        return (
            f"; they are saved in {self.state.path}: run the same command with `resume=True` to "
            "continue from there"
        )

    def write(self) -> None:
        """Saves the state if it has changed."""
        if self.state is not None and len(self.known) > self._written:
            self.state.write(self.known, self.clock())
            self._written, self._wrote = len(self.known), time.monotonic()
