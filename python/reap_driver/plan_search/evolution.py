"""The evolutionary algorithm: chooses which candidates to evaluate next.

The elites are the best candidates evaluated so far; each new candidate is a mutation of one of
them. Every generation has its own random seed, so the seed and the fitness values determine the
whole search. To resume a search, run it again: candidates whose fitness is known are not evaluated
again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from reap_driver.plan_search.space import Removals, Space
from reap_kernels.errors import PlanError

_DRAWS = 50  # mutations tried per new candidate before the search counts as exhausted


@dataclass(frozen=True)
class Settings:
    """Settings of the evolutionary search.

    Attributes:
        evaluations: number of candidates to evaluate, the first generation included; fewer if the
            space has fewer.
        population: number of candidates in a generation, elites included.
        elites: number of best candidates that are mutated to make the next generation.
        seed: random seed of the first generation and of the mutations.
    """

    evaluations: int = 500
    population: int = 32
    elites: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.elites < self.population:
            raise PlanError(
                f"{self.elites} elites in a population of {self.population} leave no room for new "
                "candidates; use at least one elite and a larger population"
            )
        if self.evaluations < 1:
            raise PlanError(
                f"evaluations={self.evaluations} is below 1; use 1 or more, such as 500"
            )


def evolve(
    space: Space,
    fitness: Callable[[Removals], float],
    settings: Settings,
    *,
    generation_done: Callable[[], None] = lambda: None,
) -> dict[Removals, float]:
    """Searches a space for the candidate with the highest fitness.

    Args:
        space: the space of candidates.
        fitness: returns a candidate's fitness (higher is better); called once per candidate.
        settings: settings of the search.
        generation_done: called after each generation.

    Returns:
        Every evaluated candidate with its fitness, in the order of evaluation.
    """
    evaluated: dict[Removals, float] = {}
    generation = 0
    while True:
        new = _generation(space, settings, generation, evaluated)
        for removals in new[: settings.evaluations - len(evaluated)]:
            evaluated[removals] = fitness(removals)
        generation_done()
        if not new or len(evaluated) == settings.evaluations:
            return evaluated
        generation += 1


def best_of(evaluated: Mapping[Removals, float], number: int) -> list[Removals]:
    """The `number` candidates with the highest fitness; of equal ones, the first evaluated."""
    return sorted(evaluated, key=lambda removals: -evaluated[removals])[:number]


def _generation(
    space: Space, settings: Settings, generation: int, evaluated: Mapping[Removals, float]
) -> list[Removals]:
    """The new candidates of a generation; none if no mutation of the elites is new."""
    draw = Random(f"reap-search {settings.seed} {generation}")
    if not evaluated:
        return space.first(settings.population, draw)
    elites = best_of(evaluated, settings.elites)
    wanted = settings.population - len(elites)
    fresh: dict[Removals, None] = {}
    for _ in range(_DRAWS * wanted):
        child = space.mutated(elites[int(draw.random() * len(elites))], draw)
        if child not in evaluated:
            fresh[child] = None
        if len(fresh) == wanted:
            break
    return list(fresh)
