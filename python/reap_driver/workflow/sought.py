"""What a search looks for: what searches over budgets and over shapes do each in their own way."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from reap_driver.base.interrupts import Stop
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.plan_search.budget_search import Found
from reap_driver.plan_search.fitness import Candidate
from reap_driver.plan_search.recorder import Recorder
from reap_driver.plan_search.shape_search import FoundShape
from reap_driver.planning.plan import Plan
from reap_driver.workflow.listener import Listener

Outcome = Found | FoundShape


class Sought(ABC):
    """Plans of one kind, among which the best is sought.

    Attributes:
        uniform: the plan of whole experts, as many of every layer, that the outcome is compared
            with.
        notes: on the plan and the model, for the outcome.
        kind: what names a candidate in the state of the search.
        units: what is counted while it goes on.
        most: candidates that are tried, at most.
    """

    uniform: Plan
    notes: list[str]
    kind: str
    units: str
    most: int

    @abstractmethod
    def asked(self) -> dict[str, Any]:
        """What identifies the search besides model, text and the uniform plan."""

    @abstractmethod
    def length(self) -> dict[str, Any]:
        """How long it goes on, which may differ where it is resumed."""

    @abstractmethod
    def prepare(self, masks: RouterMasks, stop: Stop, heard: Listener) -> None:
        """What is done once the model is in memory, before anything is tried.

        Raises:
            Interrupted: a stop was requested.
        """

    @abstractmethod
    def measured(self, fitness: Callable[[Candidate], float]) -> Callable[[tuple[int, ...]], float]:
        """The fitness of candidates."""

    @abstractmethod
    def find(self, recorder: Recorder) -> Outcome:
        """Searches.

        Raises:
            Interrupted: a stop was requested.
        """

    @abstractmethod
    def settled(self, found: Outcome) -> Outcome:
        """The outcome, once what goes with the plan is written, under another name."""

    @abstractmethod
    def compared(self, found: Outcome) -> list[Candidate]:
        """The uniform plan and the outcome, for held-out text; nothing if they are the same."""

    @abstractmethod
    def save(self, plan: Plan) -> None:
        """Writes the plan, and puts in place what goes with it."""

    @abstractmethod
    def close(self) -> None:
        """Removes what was written and is not in place."""
