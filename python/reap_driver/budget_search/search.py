"""Searches budgets: scores and text in, the plan of highest fitness out."""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.base.interrupts import Stop
from reap_driver.budget_search.evolution import Settings, best_of, evolve
from reap_driver.budget_search.fitness import Fitness, Inputs, Kept
from reap_driver.budget_search.held_out import HeldOut, held_out
from reap_driver.budget_search.search_state import SearchState
from reap_driver.budget_search.space import Removals, Space
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.model.discover import find_moe_layers, record_of
from reap_driver.plan.allocation import max_removable, removal_steps
from reap_driver.plan.criteria import Scores
from reap_driver.plan.plan import Plan
from reap_driver.plan.planner import make_plan, plan_of_removals
from reap_driver.writer.plan_checks import check_model, check_same_layers

_WRITE_AFTER = 30.0  # seconds between two writes of the state within a generation


class Task:
    """What is searched: plans that remove as many experts as a uniform one, lowest scores first.

    Args:
        scores: of every MoE layer; they rank the experts within a layer.
        uniform: the uniform plan made from them. Its protected experts stay, and layers that were
            given a ratio of their own lose what they lose in it.

    Attributes:
        uniform: that plan.
        notes: for the reader of every plan.
        space: of removals per layer.

    Raises:
        PlanError: there is no other plan.
    """

    def __init__(self, scores: Scores, uniform: Plan) -> None:
        self._scores, self.uniform = scores, uniform
        self.notes: list[str] = []
        self._protected = uniform.settings.get("protected")
        facts = {name: scores.layers[name] for name in uniform.layers}
        own = uniform.settings.get("layer_ratios", {})
        self._whole = {name: 0 for name in own if name not in uniform.layers}  # no token reached it
        self.space = Space.around(
            {name: len(layer.removed) for name, layer in uniform.layers.items()},
            max_removable(facts, self._protected),
            removal_steps(facts),
            fixed=[name for name in own if name in uniform.layers],
        )

    def plan(self, removals: Removals) -> Plan:
        """The plan of a candidate."""
        plan = plan_of_removals(
            self._scores,
            {**dict(zip(self.space.names, removals, strict=True)), **self._whole},
            allocation="searched",
            ratio=self.uniform.ratio,
            protected=self._protected,
        )
        settings = self.uniform.settings | plan.settings
        return dataclasses.replace(plan, settings=settings).noting(self.notes)


@dataclass
class Recorder:
    """Remembers what a search evaluates, writes it down now and then, and ends it on request.

    Attributes:
        fitness: of the experts that stay.
        task: what is searched.
        state: the file; None where none is kept.
        stop: whether somebody has asked the search to end.
        done: called after each candidate that was evaluated.
        known: what was evaluated, here and before.
        seconds: it took, before this.
    """

    fitness: Callable[[Kept], float]
    task: Task
    state: SearchState | None = None
    stop: Stop = dataclasses.field(default_factory=Stop)
    done: Callable[[], Any] = lambda: None
    known: dict[Removals, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._began = self._wrote = time.monotonic()
        self._written = len(self.known)

    def clock(self) -> float:
        """Seconds the search took, in all its runs."""
        return self.seconds + time.monotonic() - self._began

    def __call__(self, removals: Removals) -> float:
        """The fitness of a candidate.

        Raises:
            Interrupted: on request, with the state written.
        """
        if removals in self.known:
            return self.known[removals]
        value = self.known[removals] = self.fitness(self.task.plan(removals).kept)
        self.done()
        if self.stop.requested or time.monotonic() - self._wrote > _WRITE_AFTER:
            self.write()
        if self.stop.requested:
            text = f"interrupted after {len(self.known)} candidates{self._remedy()}"
            raise self.stop.interrupted(text)
        return value

    def _remedy(self) -> str:
        """How to go on, where that is possible."""
        if self.state is None:
            return ""
        return (
            f"; they are in {self.state.path}: give the same command with --resume to go on from "
            "there"
        )

    def write(self) -> None:
        """Writes the state, where there is anything new."""
        if self.state is not None and len(self.known) > self._written:
            self.state.write(self.known, self.clock())
            self._written, self._wrote = len(self.known), time.monotonic()


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        plan: the fittest, with notes of what it is worth.
        evaluated: every candidate with its fitness, in order; the first is the uniform plan.
        fitness: of the plan, on the text it was searched on.
        uniform: of the uniform plan, on the same.
        check: both on text that was held out; None where none was.
    """

    plan: Plan
    evaluated: dict[Removals, float]
    fitness: float
    uniform: float
    check: HeldOut | None = None

    def checked(self, check: HeldOut) -> "Found":
        """The same with what held-out text says; the plan stays what it is."""
        notes = [*self.plan.notes, *_check_notes(check)]
        return dataclasses.replace(
            self, plan=dataclasses.replace(self.plan, notes=notes), check=check
        )


def search(recorder: Recorder, settings: Settings) -> Found:
    """Runs a search to its end.

    Args:
        recorder: of the task; what it knows is not evaluated again.
        settings: of the search.

    Raises:
        Interrupted: on request.
    """
    task = recorder.task
    evaluated = evolve(task.space, recorder, settings, generation_done=recorder.write)
    [best] = best_of(evaluated, 1)
    plan, value, uniform = task.plan(best), evaluated[best], evaluated[task.space.uniform]
    notes = [
        *task.uniform.notes,
        *plan.notes,
        f"the fittest of {len(evaluated)} budgets: expected acceptance {value:.4f} on the text it "
        f"was searched on, where the uniform plan has {uniform:.4f}",
    ]
    return Found(dataclasses.replace(plan, notes=notes), evaluated, value, uniform)


def _check_notes(check: HeldOut) -> list[str]:
    """What held-out text says."""
    said = (
        f"expected acceptance on {check.sequences} held-out sequences {check.searched:.4f}, of the "
        f"uniform plan {check.uniform:.4f} (difference {check.searched - check.uniform:+.4f}"
    )
    if check.low is not None:
        said += f", 95 % interval {check.low:+.4f} to {check.high:+.4f}"
    said += ")"
    if not check.lost:
        return [said]
    return [
        said,
        "the searched plan is worse than the uniform one on held-out text: use the uniform plan, "
        "or search on more data",
    ]


@typed
def search_plan(
    model: PreTrainedModel,
    scores: Scores,
    batches: Sequence[Inputs],
    ratio: float = 0.5,
    *,
    validation: Sequence[Inputs] = (),
    settings: Settings | None = None,
    protected: Mapping[str, Collection[int]] | None = None,
    layer_ratios: Mapping[str, float] | None = None,
    force_model: bool = False,
) -> Plan:
    """Searches how many experts each layer should lose (EvoESAP, arXiv 2603.06003).

    Args:
        model: the full model, in memory; it is what it was afterwards.
        scores: of every MoE layer; which experts of a layer go is decided by them.
        batches: text to search on, as arguments of the model: `input_ids` [batch, seq] int64 and
            what goes with them. The full model's logits for it are kept in memory.
        ratio: share of experts to remove; as many go as in the uniform plan.
        validation: other text, on which the result is compared with the uniform plan.
        settings: number of candidates, population, seed; default 500 candidates.
        protected: {layer: ids} that stay.
        layer_ratios: {layer: ratio} of layers that lose just that.
        force_model: take scores of a model that routes otherwise or has other sizes, where its
            layers and their numbers of experts are the same.

    Returns:
        The plan of highest expected acceptance, with notes of what it is worth.

    Raises:
        PlanError: the scores are of another model, the ratio is not possible, or there is nothing
            to search.
        DataError: no token of the text counts, or logits are not finite.
        ResourceError: the full model's logits do not fit in memory.
        UnsupportedModel: routers cannot be masked.
    """
    settings = Settings() if settings is None else settings
    uniform = make_plan(scores, ratio, protected=protected, layer_ratios=layer_ratios)
    layers = find_moe_layers(model)
    check_same_layers(uniform, layers)
    record, name = record_of(model, layers), type(model).__name__
    task, masks = Task(scores, uniform), RouterMasks(model)
    task.notes = check_model(uniform, record, name, force=force_model)
    fitness = Fitness(model, batches, masks)

    found = search(Recorder(fitness, task), settings)
    if validation:
        plans = (uniform, found.plan)
        check = held_out(model, validation, *plans, masks=masks, seed=settings.seed)
        found = found.checked(check)
    return found.plan
