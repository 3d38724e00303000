"""The shape search: which shape of a size follows the full model most closely, by measurement.

A shape is a number of experts and of neurons that every layer keeps. The cut of whole experts is
tried first, then the shape that is expected to cost least and those halfway from it to either end
of the allowed widths; then those halfway between the best so far and what was tried on either side
of it; where there is none between, the nearest to the best. It ends when `MOST` or all were tried.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.compensation.shaping import Shaping
from reap_driver.compensation.width import RIDGE
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.model.discover import find_moe_layers, record_of
from reap_driver.plan_search.fitness import Fitness, Inputs
from reap_driver.plan_search.held_out import HeldOut, held_out
from reap_driver.plan_search.recorder import Recorder
from reap_driver.plan_search.shape_task import Grams, ShapeTask
from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import make_plan
from reap_driver.planning.scoring import score
from reap_driver.planning.shape import Shape
from reap_driver.writer.plan_checks import check_model, check_same_layers
from reap_kernels import SaliencyStats

MOST = 7  # shapes that remove neurons
WHOLE = "cut of whole experts"
TRIED = "tried (experts x neurons: expected error, acceptance): "  # begins the note with the table


@dataclass(frozen=True)
class Tried:
    """A shape that was tried.

    Attributes:
        shape: experts and neurons that every layer keeps.
        expected_error: what the observed sums foretold, see `expected_error` of
            `reap_driver.compensation.shapes`; the less the better.
        acceptance: expected acceptance on the text of the search; the more the better.
    """

    shape: Shape
    expected_error: float
    acceptance: float


@dataclass(frozen=True)
class FoundShape:
    """The result of a search over shapes.

    Attributes:
        plan: of the shape with the highest acceptance, with notes on it.
        shape: that shape.
        tried: every shape that was tried, in this order; the first is the cut of whole experts.
        fitness: acceptance of the plan, on the text of the search.
        uniform: that of the cut of whole experts, on the same text.
        check: both compared on held-out text; None without such text, or where whole experts win.
        matrices: {layer: [E', H, I']}, the plan's new down projections; None where whole experts
            win.

    Example:
        >>> found = rd.search_shape(model, stats, grams, batches, ratio=0.5)
        >>> [str(one.shape) for one in found.tried]
        ['16x48', '24x32']
    """

    plan: Plan
    shape: Shape
    tried: tuple[Tried, ...]
    fitness: float
    uniform: float
    check: HeldOut | None = None
    matrices: Mapping[str, Tensor] | None = None

    @property
    def evaluations(self) -> int:
        """Shapes that were tried."""
        return len(self.tried)

    def table(self) -> list[dict[str, Any]]:
        """What was tried, as JSON values."""
        return [{**dataclasses.asdict(one), "shape": str(one.shape)} for one in self.tried]

    def checked(self, check: HeldOut) -> "FoundShape":
        """This result with the comparison on held-out text; the plan only gets its notes."""
        notes = [*self.plan.notes, *check.notes(WHOLE)]
        plan = dataclasses.replace(self.plan, notes=notes)
        return dataclasses.replace(self, plan=plan, check=check)


def search(task: ShapeTask, recorder: Recorder) -> FoundShape:
    """Tries shapes, see the top of this file; the orders of all layers must be known.

    Args:
        task: the shapes.
        recorder: evaluates them; those it knows are not evaluated again.

    Raises:
        Interrupted: the search was asked to end.
    """
    expected = [task.expected(shape) for shape in task.shapes]
    first = min(range(len(expected)), key=lambda number: expected[number])
    shapes = [*task.shapes, task.whole]

    def fitness(number: int) -> float:
        return recorder(shapes[number])

    values = tried(len(task.shapes), first, fitness)
    recorder.write()
    errors = [*expected, task.expected(task.whole)]
    found = tuple(Tried(shapes[n], errors[n], value) for n, value in values.items())
    best = max(found, key=lambda one: one.acceptance)  # of equal ones, the first that was tried
    plan = task.plan(best.shape)
    return FoundShape(
        dataclasses.replace(plan, notes=[*plan.notes, *_notes(found, best)]),
        best.shape,
        found,
        best.acceptance,
        found[0].acceptance,
    )


@typed
def search_shape(
    model: PreTrainedModel,
    stats: SaliencyStats,
    grams: Grams,
    batches: Sequence[Inputs],
    ratio: float = 0.5,
    *,
    scores: Scores | None = None,
    validation: Sequence[Inputs] = (),
    width_multiple: int | None = None,
    ridge: float = RIDGE,
    protected: Mapping[str, Collection[int]] | None = None,
    seed: int = 0,
    force_model: bool = False,
) -> FoundShape:
    """Searches for the number of experts, and of neurons of each, that all layers should keep.

    Tries seven shapes of the same size, or all if there are fewer, and the cut of whole experts.
    Each is put into the model in memory, with the down projections of its experts corrected as in
    `prune_width`, and judged by its expected acceptance as in `search_plan`. The result is the same
    for all layers, so every engine loads it.

    Memory: on top of the model, the full model's logits on the text, and E' H (I + I') numbers per
    layer of experts: the matrices of the shape that is tried, and those that they replace.

    Args:
        model: the full model, in memory and in evaluation mode; it is unchanged afterwards.
        stats: its statistics, by which errors are expected.
        grams: {layer: Gram sums} of the same run, or their folder.
        batches: text to search on, as keyword arguments of the model's forward, see `search_plan`.
        ratio: share of the expert weights to remove, in (0, 1).
        scores: decide which experts stay; by default REAP's, of `stats`.
        validation: held-out batches, on which the result is compared with the cut of whole experts.
        width_multiple: of which the neurons of an expert are a multiple; default gcd(I, 64).
        ridge: see `prune_width`.
        protected: {layer: ids of experts that are kept}.
        seed: of the intervals.
        force_model: accept scores of a model with other routing settings or sizes, if its layers
            and their numbers of experts are the same.

    Returns:
        The plan with the highest expected acceptance, its matrices, and what was tried.

    Raises:
        PlanError: the scores are of another model, layers differ, or no shape has the size.
        DataError: a layer has no Gram sums, the text has no prediction that counts, or values are
            not finite.
        ShapeError: the Gram sums are of other experts.
        ResourceError: what the search holds does not fit in memory.
        UnsupportedModel: the model's routers cannot be masked, or its matrices not replaced.

    Example:
        >>> with rd.observe(model, gram=True) as obs:
        ...     for batch in batches:
        ...         obs(**batch)
        >>> found = rd.search_shape(model, obs.stats, obs.grams, batches, ratio=0.5)
        >>> found.plan.shape
        '24x32'
    """
    scores = score(stats) if scores is None else scores
    masks, whole = RouterMasks(model), make_plan(scores, ratio, protected=protected)
    layers = find_moe_layers(model)
    check_same_layers(whole, layers)
    record, name = record_of(model, layers), type(model).__name__
    notes = check_model(whole, record, name, force=force_model)
    shaping = Shaping(scores, stats, ridge=ridge, protected=protected)
    settings = {"shape": "auto", "width_multiple": width_multiple, "ridge": ridge}
    given = {name: value for name, value in settings.items() if value is not None}
    task = ShapeTask(masks, grams, shaping, whole, multiple=width_multiple, settings=given)
    task.notes = notes
    fitness = Fitness(model, batches)
    task.check_memory()
    for layer in shaping.names:
        task.measure(layer)
    found = search(task, Recorder(task.measured(fitness)))
    if not found.plan.narrows:
        return found
    matrices = {name: down.cpu() for name, down in task.matrices(found.plan)}
    found = dataclasses.replace(found, matrices=matrices)
    if validation:
        both = (whole, found.plan)
        plans = [task.candidate(plan, found.matrices) for plan in both]
        found = found.checked(held_out(model, validation, *plans, seed=seed))
    return found


def tried(number: int, first: int, fitness: Callable[[int], float]) -> dict[int, float]:
    """Which of some shapes are tried, by the rule at the top of this file.

    Args:
        number: of shapes 0, 1, ... that remove neurons, narrowest first; the cut of whole experts
            has this number itself.
        first: the one that is expected to cost least.
        fitness: of a shape, the higher the better.

    Returns:
        {shape: its fitness}, in the order in which they were tried.

    Example:
        >>> list(tried(12, first=5, fitness=lambda shape: -abs(shape - 7)))
        [12, 5, 2, 9, 3, 7, 6, 8]
    """
    known = {number: fitness(number)}
    center = first
    known[first] = fitness(first)
    while len(known) <= min(number, MOST):
        left = max((n for n in known if n < center), default=-1)
        right = min((n for n in known if n > center), default=center)
        halfway = ((left + center) // 2, (center + right + 1) // 2)
        new = [n for n in halfway if n not in known and n >= 0]
        if not new:
            new = [min(set(range(number)) - known.keys(), key=lambda n: (abs(n - center), n))]
        for n in new[: MOST + 1 - len(known)]:
            known[n] = fitness(n)
        center = max(known, key=lambda n: known[n])
    return known


def _notes(found: Sequence[Tried], best: Tried) -> list[str]:
    """Sentences on what was tried, and why one was chosen."""
    whole = found[0]
    table = "; ".join(
        f"{one.shape}: {one.expected_error:.4f}, {one.acceptance:.4f}" for one in found
    )
    said = (
        f"of {len(found)} shapes {best.shape} has the highest expected acceptance on the text of "
        f"the search, {best.acceptance:.4f}"
    )
    said += (
        f", where the {WHOLE} ({whole.shape}) has {whole.acceptance:.4f}"
        if best is not whole
        else f": the {WHOLE}, so no neurons are removed"
    )
    return [said, TRIED + table]
