"""The budget search: finds the plan with the highest fitness, given scores and text."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.model.discover import find_moe_layers, record_of
from reap_driver.plan_search.evolution import Settings, best_of, evolve
from reap_driver.plan_search.fitness import Candidate, Fitness, Inputs
from reap_driver.plan_search.held_out import HeldOut, held_out
from reap_driver.plan_search.recorder import Recorder
from reap_driver.plan_search.space import Removals, Space
from reap_driver.planning.allocation import max_removable, removal_steps
from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import make_plan, plan_of_removals
from reap_driver.writer.plan_checks import check_model, check_same_layers


class Task:
    """The plans to search: they remove as many experts as a uniform plan, lowest scores first.

    Args:
        scores: scores of every MoE layer; they rank the experts within a layer.
        uniform: the uniform plan made from them. Its protected experts are kept, and layers with
            a ratio of their own lose as many experts as in this plan.

    Attributes:
        uniform: the uniform plan.
        notes: notes added to every plan.
        space: the space of removals per layer.

    Raises:
        PlanError: there is no plan but the uniform one.
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
        """The plan that removes these numbers of experts."""
        plan = plan_of_removals(
            self._scores,
            {**dict(zip(self.space.names, removals, strict=True)), **self._whole},
            allocation="searched",
            ratio=self.uniform.ratio,
            protected=self._protected,
        )
        settings = self.uniform.settings | plan.settings
        return dataclasses.replace(plan, settings=settings).noting(self.notes)

    def measured(
        self, fitness: Callable[[Candidate], float], masks: RouterMasks
    ) -> Callable[[Removals], float]:
        """The fitness of removals."""
        return lambda removals: fitness(partial(masks.keeping, self.plan(removals).kept))


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        plan: the plan with the highest fitness, with notes on it.
        evaluated: every candidate with its fitness, in the order of evaluation; the first is the
            uniform plan.
        fitness: fitness of the plan, on the text of the search.
        uniform: fitness of the uniform plan, on the same text.
        check: both plans compared on held-out text; None without held-out text.
    """

    plan: Plan
    evaluated: dict[Removals, float]
    fitness: float
    uniform: float
    check: HeldOut | None = None

    @property
    def evaluations(self) -> int:
        """Candidates that were tried."""
        return len(self.evaluated)

    def checked(self, check: HeldOut) -> "Found":
        """This result with the comparison on held-out text; the plan only gets its notes."""
        notes = [*self.plan.notes, *check.notes("uniform plan")]
        return dataclasses.replace(
            self, plan=dataclasses.replace(self.plan, notes=notes), check=check
        )


def search(task: Task, recorder: Recorder, settings: Settings) -> Found:
    """Runs a search to its end.

    Args:
        task: the plans to search.
        recorder: evaluates the candidates; those it knows are not evaluated again.
        settings: settings of the search.

    Raises:
        Interrupted: the search was asked to end.
    """
    evaluated = evolve(task.space, recorder, settings, generation_done=recorder.write)
    [best] = best_of(evaluated, 1)
    plan, value, uniform = task.plan(best), evaluated[best], evaluated[task.space.uniform]
    notes = [
        *task.uniform.notes,
        *plan.notes,
        f"the fittest of {len(evaluated)} budgets: expected acceptance {value:.4f} on the text of "
        f"the search, where the uniform plan has {uniform:.4f}",
    ]
    return Found(dataclasses.replace(plan, notes=notes), evaluated, value, uniform)


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
    """Searches for the number of experts that each layer should lose (EvoESAP, arXiv 2603.06003).

    Every candidate removes as many experts in total as the uniform plan, and within each layer
    those with the lowest scores. Its fitness is its expected acceptance: the share of its tokens
    that speculative sampling with the full model as the target would accept.

    Args:
        model: the full model, in memory and in evaluation mode; it is unchanged afterwards.
        scores: scores of every MoE layer.
        batches: text to search on, as keyword arguments of the model's forward: `input_ids`
            [batch, seq] int64, and if needed `attention_mask` [batch, seq]. The full model's logits
            on this text are kept in memory.
        ratio: fraction of the experts to remove, in (0, 1).
        validation: held-out batches, on which the result is compared with the uniform plan.
        settings: number of evaluations, population, seed; 500 evaluations by default.
        protected: {layer: ids of experts that are kept}.
        layer_ratios: {layer: fraction to remove} of layers that the search leaves alone.
        force_model: accept scores of a model with other routing settings or sizes, if its layers
            and their numbers of experts are the same.

    Returns:
        The plan with the highest expected acceptance; its notes give the acceptance of both plans.

    Raises:
        PlanError: the scores are of another model, the ratio is not possible, or there is no
            budget but the uniform one.
        DataError: the text has no prediction that counts, or logits are not finite.
        ResourceError: the full model's logits do not fit in memory.
        UnsupportedModel: the model's routers cannot be masked.

    Example:
        >>> from reap_driver.plan_search.evolution import Settings
        >>> settings = Settings(evaluations=4, population=2, elites=1)
        >>> rd.search_plan(model, scores, batches, ratio=0.5, settings=settings).ratio
        0.5
    """
    settings = Settings() if settings is None else settings
    uniform = make_plan(scores, ratio, protected=protected, layer_ratios=layer_ratios)
    layers = find_moe_layers(model)
    check_same_layers(uniform, layers)
    record, name = record_of(model, layers), type(model).__name__
    task, masks = Task(scores, uniform), RouterMasks(model)
    task.notes = check_model(uniform, record, name, force=force_model)
    measured = task.measured(Fitness(model, batches), masks)

    found = search(task, Recorder(measured), settings)
    if validation:
        plans = [partial(masks.keeping, plan.kept) for plan in (uniform, found.plan)]
        check = held_out(model, validation, *plans, seed=settings.seed)
        found = found.checked(check)
    return found.plan
