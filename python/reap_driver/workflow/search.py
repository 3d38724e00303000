"""Searching: the plan that follows the model most closely, by trying plans on the model itself."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reap_driver.base.interrupts import deferred
from reap_driver.base.units import in_bytes
from reap_driver.data.packing import PackedSource
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.files.matrices import folder_beside
from reap_driver.observation.data_parallel import Ranks
from reap_driver.plan_search import search_state as states
from reap_driver.plan_search.budget_search import Found
from reap_driver.plan_search.fitness import Fitness
from reap_driver.plan_search.held_out import held_out
from reap_driver.plan_search.recorder import Recorder
from reap_driver.plan_search.search_state import Saved, SearchState
from reap_driver.plan_search.shape_search import TRIED, FoundShape
from reap_driver.planning.plan import Plan
from reap_driver.workflow.complete import Complete, finished, made_by
from reap_driver.workflow.holding import Holding, holding
from reap_driver.workflow.identity import asked_for, environment
from reap_driver.workflow.inspection import Model, inspect_model
from reap_driver.workflow.jobs import SearchOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.outputs import check_file, inputs_of
from reap_driver.workflow.plan import plan_facts
from reap_driver.workflow.results import Result
from reap_driver.workflow.search_budgets import Budgets
from reap_driver.workflow.search_data import Batches, batch_sizes, divided, searched_sources
from reap_driver.workflow.search_shapes import Shapes
from reap_driver.workflow.sought import Sought
from reap_driver.writer.plan_checks import check_model, check_same_layers
from reap_driver.writer.plan_matrices import matrices_of
from reap_kernels.errors import CheckpointError

_ROW = "  {:<13}{:>14}{:>12}  {}"  # of the table of shapes


@dataclass(frozen=True, repr=False)
class Searched(Result):
    """A plan that was found.

    Attributes:
        found: the plan, every candidate with its fitness, and the check on held-out text; of a
            search over shapes a `FoundShape`.
        seconds: the search took, interrupted runs included.
        predictions: each candidate was judged by.
        cache_bytes: the full model's logits for them took.
        out: where the plan was saved; None: nowhere.

    Example:
        >>> few = {"evaluations": 4, "population": 2, "elites": 1, "seq_len": 64}
        >>> searched = rd.search("MODEL", stats, "code.jsonl:40", **few)
        >>> searched.plan.allocation
        'searched'
    """

    found: Found | FoundShape
    seconds: float
    predictions: int
    cache_bytes: int
    out: Path | None = None

    @property
    def plan(self) -> Plan:
        """The plan of highest fitness."""
        return self.found.plan

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        out = {} if self.out is None else {"out": str(self.out)}
        check = self.found.check
        return {
            **out,
            **plan_facts(self.plan),
            "evaluations": self.found.evaluations,
            **({"tried": self.found.table()} if isinstance(self.found, FoundShape) else {}),
            "acceptance": {"searched": self.found.fitness, "uniform": self.found.uniform},
            "held_out": None
            if check is None
            else {
                "sequences": check.sequences,
                "predictions": check.predictions,
                "searched": check.searched,
                "uniform": check.uniform,
                "difference_low": check.low,
                "difference_high": check.high,
            },
            "seconds": round(self.seconds, 3),
            "predictions": self.predictions,
            "cache_bytes": self.cache_bytes,
        }

    def describe(self) -> str:
        """See `Result`."""
        if not isinstance(self.found, FoundShape):
            return self.plan.describe()
        rows = [_ROW.format("tried", "expected error", "acceptance", "").rstrip()]
        for number, one in enumerate(self.found.tried):
            said = "cut of whole experts" if number == 0 else ""
            chosen = "chosen" if one.shape == self.found.shape else ""
            words = ", ".join(filter(None, (said, chosen)))
            error, acceptance = f"{one.expected_error:.4f}", f"{one.acceptance:.4f}"
            rows.append(_ROW.format(str(one.shape), error, acceptance, words).rstrip())
        return "\n".join([self.plan.describe(), *rows])


def search(options: SearchOptions, listener: Listener | None = None) -> Searched | Complete:
    """Searches and saves the plan, after all checks that need no weights. See `reap_driver.search`.

    Raises:
        ResourceError: the model does not fit.
        Interrupted: on request; the text says how to go on.
        DataError, PlanError: data, state or plan do not fit each other.
    """
    heard, out = Collector(listener), options.out
    with contextlib.ExitStack() as stack:
        if isinstance(out, Path):
            # What is there may be the output of this command, see `_searched`.
            replaced = options.overwrite or options.resume == "auto"
            check_file(out, overwrite=replaced, inputs=inputs_of(options, out))
            place = out.absolute()
        else:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reap-")), "plan")
        found = _searched(options, place, heard)
    if isinstance(found, Complete):
        return found
    for note in found.plan.notes:
        if not note.startswith(TRIED):  # `describe` has the table
            heard.note(note)
    found = replace(found, notes=heard.notes)
    heard.say(found.describe())
    return found


def _searched(options: SearchOptions, place: Path, heard: Collector) -> Searched | Complete:
    """Searches, and saves the plan; the state is deleted then."""
    path = state_path(place)
    with states.locked(path), contextlib.ExitStack() as stack:
        saved = _saved(path, options)
        trust = options.run.trust_remote_code
        model = inspect_model(str(options.model), trust_remote_code=trust)
        sought = _sought(options, model, place, heard)
        stack.callback(sought.close)
        sources = searched_sources(options, model, heard)
        wanted = _asked(options, model, sources, sought)
        whole = {**wanted, **sought.length()}
        if _complete(options, path, wanted, whole):
            return finished(place, heard)
        how = Holding(False, "device", batch_sizes(options, model, sources, saved, place))
        identity = {**wanted, **environment(options.run, how, Ranks())}
        state = SearchState(path, identity, sought.kind)
        if saved is not None:
            saved = state.resume()  # before anything else: it may be of another search
        else:
            state.remove()
        with holding(model.path, options.run, how, place, heard) as held:
            model.check_unchanged()
            parts = divided(options, model, sources, how)
            found = _run(held.model, parts, _Job(sought, state, saved, options), heard)
            plan = replace(found.plan, run=whole)
            if found.out is not None:
                sought.save(plan)
        state.remove()
    return replace(found, found=replace(found.found, plan=plan))


def _sought(options: SearchOptions, model: Model, place: Path, heard: Listener) -> Sought:
    """What is searched, checked to be of the model."""
    sought: Sought = (
        Budgets(options, model, place, heard)
        if options.shape.shape is None
        else Shapes(options, model, place)
    )
    check_same_layers(sought.uniform, model.layers)
    force = options.force_model
    sought.notes += check_model(sought.uniform, model.provenance, model.path, force=force)
    return sought


def _complete(
    options: SearchOptions, state: Path, wanted: Mapping[str, Any], whole: Mapping[str, Any]
) -> bool:
    """With `resume='auto'`, whether this command has saved its plan; a state left of it is deleted.

    Args:
        options: of the search.
        state: path of the state.
        wanted: what the search is asked for, but for how long it goes on.
        whole: the same, and that.

    Raises:
        CheckpointError, PlanError, DataError: plan or state is of another command.
    """
    out = options.out
    if options.resume != "auto" or not isinstance(out, Path):
        return False
    if not made_by(out, lambda: (_recorded(out), whole), overwrite=options.overwrite):
        return False
    if state.exists():
        states.check_command(state, wanted)
    state.unlink(missing_ok=True)
    return True


def _recorded(out: Path) -> dict[str, Any]:
    """What asked for a plan that is there, with its matrices if it needs any.

    Raises:
        PlanError: it cannot be read, or its matrices are not there.
    """
    plan = Plan.load(out)
    matrices_of(plan, None, folder_beside(out))
    return plan.run


def state_path(out: Path) -> Path:
    """Where the state of a search is, beside its output."""
    return out.absolute().with_name(f"{out.absolute().name}.search")


def _saved(path: Path, options: SearchOptions) -> Saved | None:
    """What an interrupted search left, where it is to go on.

    Raises:
        CheckpointError: there is a state, and neither `resume` nor `overwrite` is given.
        DataError: there is none to resume.
    """
    if options.resume is True or (options.resume == "auto" and path.exists()):
        return states.read(path)
    if path.exists() and not options.overwrite:
        raise CheckpointError(
            f"{path}: the state of a search that was interrupted; give `resume=True` to go on from "
            "it, or `overwrite=True` to start anew"
        )
    return None


def _asked(
    options: SearchOptions, model: Model, sources: Sequence[PackedSource], sought: Sought
) -> dict[str, Any]:
    """What a search is asked for, but for how long it goes on."""
    uniform = sought.uniform
    folds = options.share.denominator
    return {
        **asked_for(model, sources, options.data, options.run, folds),
        "validation": str(options.share),
        "scores": uniform.scores_digest,
        "ratio": uniform.ratio,
        "settings": uniform.settings,
        **sought.asked(),
    }


@dataclass(frozen=True)
class _Job:
    """What is searched, how, and where it is written down."""

    sought: Sought
    state: SearchState
    saved: Saved | None
    options: SearchOptions


def _run(
    model: PreTrainedModel, parts: tuple[Batches, Batches], job: _Job, heard: Collector
) -> Searched:
    """Searches with a model that is loaded."""
    sought, options = job.sought, job.options
    backend = options.run.backend
    fitness = Fitness(model, parts[0], backend=backend)
    heard.note(
        f"the full model's logits for {fitness.predictions:,} predictions take "
        f"{in_bytes(fitness.nbytes)} of memory"
    )
    text = "writing the state, then ending; press Ctrl-C again to end without"
    with deferred(lambda: heard.note(text)) as stop:
        sought.prepare(RouterMasks(model), stop, heard)
        with heard.progress("searching", f" {sought.units}", sought.most) as progress:
            saved = job.saved or Saved({}, {}, 0.0)
            known = dict(saved.evaluated)
            recorder = Recorder(
                sought.measured(fitness),
                job.state,
                stop,
                done=lambda: progress.add(1),
                known=known,
                seconds=saved.seconds,
            )
            progress.skip(min(len(known), sought.most))
            found = sought.find(recorder)
    found = sought.settled(found)
    plans = sought.compared(found) if parts[1] else []
    if plans:
        check = held_out(model, parts[1], *plans, seed=options.data.seed, backend=backend)
        found = found.checked(check)
    out = options.out if isinstance(options.out, Path) else None
    seconds, count = recorder.clock(), fitness.predictions
    return Searched(heard.notes, found, seconds, count, fitness.nbytes, out)
