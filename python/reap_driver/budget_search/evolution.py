"""The evolution of budgets: which candidates are evaluated next, given what is known of others.

Elites stay, everything else in a generation is a mutation of one of them. Because fitness is
remembered, elites are simply the best of all that was evaluated; and because each generation draws
from a seed of its own, the whole course follows from seed and fitness values. A search goes on
where another stopped by running it again over what is known.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from reap_driver.budget_search.space import Removals, Space
from reap_kernels.errors import PlanError

_DRAWS = 50  # children drawn for each that is wanted, before a neighbourhood counts as known


@dataclass(frozen=True)
class Settings:
    """What a search does, beside its space and its fitness.

    Attributes:
        evaluations: candidates evaluated, the first ones included; fewer where the space has fewer.
        population: candidates in a generation, elites included.
        elites: the best, from which the next generation is made.
        seed: of the random first plans and of the mutations.
    """

    evaluations: int = 500
    population: int = 32
    elites: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.elites < self.population:
            raise PlanError(
                f"{self.elites} elites in a population of {self.population} leave no room for new "
                "candidates; give at least one elite and a larger population"
            )
        if self.evaluations < 1:
            raise PlanError(
                f"{self.evaluations} evaluations find nothing; give 1 or more, such as 500"
            )


def evolve(
    space: Space,
    fitness: Callable[[Removals], float],
    settings: Settings,
    *,
    generation_done: Callable[[], None] = lambda: None,
) -> dict[Removals, float]:
    """Searches a space for the removals of highest fitness.

    Args:
        space: of the candidates.
        fitness: the higher the better; called once for each candidate.
        settings: of the search.
        generation_done: called after each generation.

    Returns:
        Every candidate that was evaluated, in order, with its fitness.
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
    """The fittest candidates; of equals the one that was evaluated first."""
    return sorted(evaluated, key=lambda removals: -evaluated[removals])[:number]


def _generation(
    space: Space, settings: Settings, generation: int, evaluated: Mapping[Removals, float]
) -> list[Removals]:
    """The candidates that a generation adds; none where all children of the elites are known."""
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
