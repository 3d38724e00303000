"""Searching budgets: how many experts each layer should lose."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from reap_driver.base.interrupts import Stop
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.plan_search.budget_search import Found, Task, search
from reap_driver.plan_search.evolution import Settings
from reap_driver.plan_search.fitness import Candidate
from reap_driver.plan_search.recorder import Recorder
from reap_driver.plan_search.search_state import REMOVED
from reap_driver.planning.plan import Plan
from reap_driver.workflow.inspection import Model
from reap_driver.workflow.jobs import SearchOptions
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.options import WriteOptions
from reap_driver.workflow.plan import stats_of
from reap_driver.workflow.ranking import scored
from reap_driver.workflow.sizes import sized_plan, sizing_of
from reap_driver.workflow.sought import Outcome, Sought


class Budgets(Sought):
    """Plans that remove as many experts as the uniform one, from each layer another number.

    Args:
        options: of the search.
        model: what is known of it.
        place: where the plan is saved.
        heard: hears what the uniform plan leaves, where a size is asked for.

    Raises:
        PlanError, DataError: statistics and options do not fit each other, or there is no budget
            but the uniform one.
    """

    kind, units = REMOVED, "plans"

    def __init__(self, options: SearchOptions, model: Model, place: Path, heard: Listener) -> None:
        self._options, self._place, self.notes = options, place, []
        stats = stats_of(options.stats)
        scores = scored(stats, options.rank)
        sizing = None
        if options.rank.limit is not None:
            sizing = sizing_of(
                model,
                WriteOptions(non_uniform=True),
                dtype=options.run.dtype,
                trust=options.run.trust_remote_code,
                force=options.force_model,
            )
        self.uniform = sized_plan(sizing, scores, options.rank, options.budget, stats=stats)
        if sizing is not None:
            for line in sizing.leaves(self.uniform, options.rank).lines():
                heard.say(line)
        self._task = Task(scores, self.uniform)
        self._settings = _settings(options)
        self.most = self._settings.evaluations

    def asked(self) -> dict[str, Any]:
        """See `Sought`."""
        return {"population": self._options.population, "elites": self._options.elites}

    def length(self) -> dict[str, Any]:
        """See `Sought`."""
        return asdict(self._settings)

    def prepare(self, masks: RouterMasks, stop: Stop, heard: Listener) -> None:
        """See `Sought`."""
        self._masks, self._task.notes = masks, self.notes

    def measured(self, fitness: Callable[[Candidate], float]) -> Callable[[tuple[int, ...]], float]:
        """See `Sought`."""
        return self._task.measured(fitness, self._masks)

    def find(self, recorder: Recorder) -> Found:
        """See `Sought`."""
        return search(self._task, recorder, self._settings)

    def settled(self, found: Outcome) -> Outcome:
        """See `Sought`."""
        return found

    def compared(self, found: Outcome) -> list[Candidate]:
        """See `Sought`."""
        return [partial(self._masks.keeping, plan.kept) for plan in (self.uniform, found.plan)]

    def save(self, plan: Plan) -> None:
        """See `Sought`."""
        plan.save(self._place)

    def close(self) -> None:
        """See `Sought`; nothing is written before the plan."""


def _settings(options: SearchOptions) -> Settings:
    evaluations, population = options.evaluations, options.population
    if options.generations is not None:
        evaluations = population + (options.generations - 1) * (population - options.elites)
    return Settings(evaluations, population, options.elites, options.data.seed)
