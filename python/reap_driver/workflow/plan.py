"""Planning: ranks experts by their statistics and decides which go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.base.threads import single_threaded
from reap_driver.files.matrices import folder_beside
from reap_driver.planning.criteria import known_criterion
from reap_driver.planning.plan import Plan
from reap_driver.planning.serving import served_advice
from reap_driver.planning.stability import CERTAIN, keep_probability, margin
from reap_driver.workflow.errors import OptionError
from reap_driver.workflow.jobs import PlanOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.outputs import check_file, inputs_of
from reap_driver.workflow.ranking import planned, scored
from reap_driver.workflow.results import Result
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError


@dataclass(frozen=True, repr=False)
class Planned(Result):
    """A plan that was made.

    Attributes:
        plan: it.
        margin: {layer: ids} of experts that other data might have decided otherwise; None where
            the statistics cannot tell.
        out: where the plan was saved; None: nowhere.

    Example:
        >>> rd.plan(stats, 0.25).facts()["removed"]
        32
    """

    plan: Plan
    margin: dict[str, tuple[int, ...]] | None = None
    out: Path | None = None

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        out = {} if self.out is None else {"out": str(self.out)}
        sure = {} if self.margin is None else {"margin": self.margin}
        return {**out, **plan_facts(self.plan), **sure}

    def describe(self) -> str:
        """See `Result`."""
        return self.plan.describe()


def make(options: PlanOptions, listener: Listener | None = None) -> Planned:
    """Makes a plan from statistics; see `reap_driver.plan`."""
    heard = Collector(listener)
    out = options.out
    if isinstance(out, Path):
        check_file(out, overwrite=options.overwrite, inputs=inputs_of(options, out))
    stats = stats_of(options.stats)
    scores = scored(stats, options.rank)
    if options.shape.shape is not None:
        # The model is read, and with it come transformers and the writer.
        from reap_driver.workflow.shape_plans import save_plan_of_shape

        plan = save_plan_of_shape(options, stats, scores, heard)
    elif options.rank.limit is None:
        plan = planned(scores, options.rank, options.budget, options.allocation, stats)
    else:
        # Sizes need the model, and with it transformers, which planning imports for nothing else.
        from reap_driver.workflow.plan_sizes import plan_of_size

        plan = plan_of_size(options, stats, scores, heard)
    if isinstance(out, Path) and options.shape.shape is None:
        plan.save(out)
    inside = decision_margin(plan, stats, heard)
    for note in [*plan.notes, *served_advice(plan, stats.provenance["layers"])]:
        heard.note(note)
    found = Planned(heard.notes, plan, inside, out if isinstance(out, Path) else None)
    heard.say(found.describe())
    return found


def stats_of(given: Any) -> SaliencyStats:
    """Statistics, read where a file is given."""
    return given if isinstance(given, SaliencyStats) else SaliencyStats.load(given)


def plan_of(given: Any) -> Plan:
    """A plan, read where a file is given.

    Raises:
        OptionError: it is neither.
    """
    if isinstance(given, Plan):
        return given
    if isinstance(given, Planned):
        return given.plan
    if isinstance(given, str | Path):
        return Plan.load(Path(given))
    raise OptionError(f"the plan is a {type(given).__name__}; give a file's name or a Plan")


def matrices_beside(given: Any) -> Path | None:
    """Where the matrices of a plan are that was given to a job; None if it came from no file."""
    file = given.out if isinstance(given, Planned) else given
    return folder_beside(file) if isinstance(file, str | Path) else None


def decision_margin(
    plan: Plan, stats: SaliencyStats, listener: Listener
) -> dict[str, tuple[int, ...]] | None:
    """{layer: ids} of experts that other data might have decided otherwise, with a note.

    Returns:
        None where the statistics cannot tell.
    """
    found = known_criterion(plan.criterion)
    if not stats.parts or found is None or not found.is_sum:
        return None
    try:
        with single_threaded():
            inside = margin(keep_probability(stats, plan))
    except DataError as error:
        listener.note(f"how sure the plan is cannot be told: {error}")
        return None
    experts = sum(layer.num_experts for layer in plan.layers.values())
    listener.note(
        f"{sum(map(len, inside.values()))} of {experts} experts, in {len(inside)} "
        f"layer{'s' if len(inside) != 1 else ''}, are "
        f"inside the decision margin: other data of this kind would keep them with a probability "
        f"between {1 - CERTAIN:.1%} and {CERTAIN:.1%} (as {len(stats.parts)} parts of it differ)"
    )
    return inside


def plan_facts(plan: Plan) -> dict[str, Any]:
    """A plan in numbers, for machines."""
    return {
        "criterion": plan.criterion,
        "allocation": plan.allocation,
        "settings": plan.settings,
        "ratio": plan.ratio,
        "shape": plan.shape,
        "layers": len(plan.layers),
        "experts": sum(layer.num_experts for layer in plan.layers.values()),
        "removed": sum(len(layer.removed) for layer in plan.layers.values()),
        "kept_by_layer": {name: len(layer.kept) for name, layer in plan.layers.items()},
        "uniform": plan.uniform,
        "scores_digest": plan.scores_digest,
        "notes": plan.notes,
    }
