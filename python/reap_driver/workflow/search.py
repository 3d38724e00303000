"""Searching: how many experts each layer should lose, by trying plans on the model itself."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.interrupts import deferred
from reap_driver.base.units import in_bytes
from reap_driver.budget_search import search_state as states
from reap_driver.budget_search.evolution import Settings
from reap_driver.budget_search.fitness import Fitness
from reap_driver.budget_search.held_out import held_out
from reap_driver.budget_search.recorder import Recorder
from reap_driver.budget_search.search import Found, Task
from reap_driver.budget_search.search import search as find
from reap_driver.budget_search.search_state import Saved, SearchState
from reap_driver.data.packing import PackedSource
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.observation.data_parallel import Ranks
from reap_driver.planning.plan import Plan
from reap_driver.workflow.calibration import batches_of, read_data
from reap_driver.workflow.complete import Complete, finished, made_by
from reap_driver.workflow.holding import Holding, decided, holding
from reap_driver.workflow.identity import asked_for, environment
from reap_driver.workflow.inspection import (
    Model,
    check_packing,
    device_of,
    inspect_model,
    sequence_length,
)
from reap_driver.workflow.jobs import SearchOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.options import WriteOptions
from reap_driver.workflow.outputs import check_file, inputs_of
from reap_driver.workflow.plan import plan_facts, stats_of
from reap_driver.workflow.ranking import scored
from reap_driver.workflow.results import Result
from reap_driver.workflow.sizes import sized_plan, sizing_of
from reap_driver.workflow.sources import sources_of
from reap_driver.writer.plan_checks import check_model, check_same_layers
from reap_kernels import check_backend
from reap_kernels.errors import CheckpointError, DataError, ResourceError

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True, repr=False)
class Searched(Result):
    """A plan that was found.

    Attributes:
        found: the plan, every candidate with its fitness, and the check on held-out text.
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

    found: Found
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
            "evaluations": len(self.found.evaluated),
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
        return self.plan.describe()


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
        with _searched(options, place, heard) as found:
            if isinstance(found, Complete):
                return found
            if isinstance(out, Path):
                found.plan.save(out)
    for note in found.plan.notes:
        heard.note(note)
    found = replace(found, notes=heard.notes)
    heard.say(found.describe())
    return found


@contextlib.contextmanager
def _searched(
    options: SearchOptions, place: Path, heard: Collector
) -> Iterator[Searched | Complete]:
    """Runs the search; its state is deleted when the block ends without an error."""
    path = state_path(place)
    with states.locked(path):
        saved = _saved(path, options)
        trust = options.run.trust_remote_code
        model = inspect_model(str(options.model), trust_remote_code=trust)
        task = _task(options, model, heard)
        check_same_layers(task.uniform, model.layers)
        force = options.force_model
        task.notes = check_model(task.uniform, model.provenance, model.path, force=force)
        sources = _sources(options, model, heard)
        wanted = _asked(options, model, sources, task)
        whole = {**wanted, **dataclasses.asdict(_settings(options))}
        if _complete(options, path, wanted, whole):
            yield finished(place, heard)
            return
        how = Holding(False, "device", _batch_sizes(options, model, sources, saved, place))
        state = SearchState(path, {**wanted, **environment(options.run, how, Ranks())})
        if saved is not None:
            saved = state.resume()  # before anything else: it may be of another search
        else:
            state.remove()
        with holding(model.path, options.run, how, place, heard) as held:
            model.check_unchanged()
            parts = _parts(options, model, sources, how)
            job = _Job(task, _settings(options), state, saved, options.run.backend)
            found = _run(held.model, parts, job, heard, options.out)
            plan = replace(found.plan, run=whole)
            yield replace(found, found=replace(found.found, plan=plan))
        state.remove()


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
    if not made_by(out, lambda: (Plan.load(out).run, whole), overwrite=options.overwrite):
        return False
    if state.exists():
        states.check_command(state, wanted)
    state.unlink(missing_ok=True)
    return True


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


def _settings(options: SearchOptions) -> Settings:
    evaluations, population = options.evaluations, options.population
    if options.generations is not None:
        evaluations = population + (options.generations - 1) * (population - options.elites)
    return Settings(evaluations, population, options.elites, options.data.seed)


def _task(options: SearchOptions, model: Model, heard: Listener) -> Task:
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
    plan = sized_plan(sizing, scores, options.rank, options.budget, stats=stats)
    if sizing is not None:
        for line in sizing.leaves(plan, options.rank).lines():
            heard.say(line)
    return Task(scores, plan)


def _sources(options: SearchOptions, model: Model, heard: Listener) -> list[PackedSource]:
    data, run = options.data, options.run
    wanted = sources_of(options, heard)
    seq_len = sequence_length(model, data, run)
    check_backend("compare", device_of(run), model.meta.dtype, run.backend)
    check_packing(model, data)
    model.check_files()
    return read_data(model, wanted, data, run, seq_len, heard)


def _batch_sizes(
    options: SearchOptions,
    model: Model,
    sources: Sequence[PackedSource],
    saved: Saved | None,
    place: Path,
) -> list[int]:
    """Sequences at a time, for each source: as before where a search is resumed.

    Raises:
        ResourceError: the model would have to be streamed.
    """
    run = options.run
    if saved is not None and run.batch_size is None:
        return list(saved.run.get("batch sizes", []))
    size = run.batch_size or 1
    if run.device_map is None:
        decision = decided(run, model, sources, place.parent, all_logits=True)
        size = decision.batch_size
        if decision.stream:
            raise ResourceError(
                "the model does not fit in memory, and a search runs it hundreds of times: "
                f"{'; '.join(decision.reasons)}; use a machine with more memory, several GPUs by "
                "`device_map=auto`, or `stream=never` to try"
            )
    return [min(size, source.full_sequences) for source in sources]


def _asked(
    options: SearchOptions, model: Model, sources: Sequence[PackedSource], task: Task
) -> dict[str, Any]:
    """What a search is asked for, but for how long it goes on."""
    uniform = task.uniform
    folds = options.share.denominator
    return {
        **asked_for(model, sources, options.data, options.run, folds),
        "validation": str(options.share),
        "scores": uniform.scores_digest,
        "ratio": uniform.ratio,
        "settings": uniform.settings,
        "population": options.population,
        "elites": options.elites,
    }


def _parts(
    options: SearchOptions, model: Model, sources: Sequence[PackedSource], how: Holding
) -> tuple[Batches, Batches]:
    """Batches to search on, and those that are held out.

    Raises:
        DataError: there are too few sequences for both.
    """
    share = options.share
    packed = batches_of(model.config, model.layers, sources, how.batch_sizes, share.denominator)
    parts: tuple[Batches, Batches] = ([], [])
    for number in range(len(packed)):
        parts[packed.fold(number) < share.numerator].append(packed.inputs(number))
    if not parts[0] or (share and not parts[1]):
        sequences = sum(source.sequences for source in sources)
        raise DataError(
            f"the data is {sequences} sequences, too few to hold out {share} of them; give more, a "
            "smaller `seq_len`, or `validation=0`"
        )
    return parts


@dataclass(frozen=True)
class _Job:
    """What is searched, how, and where it is written down."""

    task: Task
    settings: Settings
    state: SearchState
    saved: Saved | None
    backend: str | None


def _run(
    model: PreTrainedModel,
    parts: tuple[Batches, Batches],
    job: _Job,
    heard: Collector,
    out: Path | str | None,
) -> Searched:
    """Searches with a model that is loaded."""
    masks, settings = RouterMasks(model), job.settings
    fitness = Fitness(model, parts[0], backend=job.backend)
    heard.note(
        f"the full model's logits for {fitness.predictions:,} predictions take "
        f"{in_bytes(fitness.nbytes)} of memory"
    )
    text = "writing the state, then ending; press Ctrl-C again to end without"
    with (
        deferred(lambda: heard.note(text)) as stop,
        heard.progress("searching", " plans", settings.evaluations) as progress,
    ):
        saved = job.saved or Saved({}, {}, 0.0)
        known = dict(saved.evaluated)
        recorder = Recorder(
            job.task.measured(fitness, masks),
            job.state,
            stop,
            done=lambda: progress.add(1),
            known=known,
            seconds=saved.seconds,
        )
        progress.skip(min(len(known), settings.evaluations))
        found = find(job.task, recorder, settings)
    if parts[1]:
        plans = [partial(masks.keeping, plan.kept) for plan in (job.task.uniform, found.plan)]
        check = held_out(model, parts[1], *plans, seed=settings.seed, backend=job.backend)
        found = found.checked(check)
    saved_to = out if isinstance(out, Path) else None
    seconds, count = recorder.clock(), fitness.predictions
    return Searched(heard.notes, found, seconds, count, fitness.nbytes, saved_to)
