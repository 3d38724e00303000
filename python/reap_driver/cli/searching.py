"""How `search` runs: model and data held as decided, the state beside the output, Ctrl-C heard."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from reap_driver.budget_search.search import Found, Recorder, Task, search
from reap_driver.budget_search.search_state import Saved, SearchState
from reap_driver.cli import calibrate, ranking, running
from reap_driver.cli.calibrate import Model
from reap_driver.cli.console import Console
from reap_driver.cli.running import How
from reap_driver.data.packing import PackedSource
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.observation.data_parallel import Ranks
from reap_driver.plan.scoring import score
from reap_driver.writer.plan_checks import check_model, check_same_layers
from reap_kernels import SaliencyStats, check_backend
from reap_kernels.errors import CheckpointError, DataError, ResourceError

_ALONE = Ranks()  # a search runs in one process


@contextlib.contextmanager
def searched(args: argparse.Namespace, console: Console) -> Iterator[tuple[Found, dict[str, Any]]]:
    """Runs the search; its state is deleted when the block ends without an error.

    Yields:
        What was found, and what it cost: `seconds`, `predictions`, `cache_bytes`.

    Raises:
        ResourceError: the model does not fit.
        Interrupted: on request; the text says how to go on.
        DataError, PlanError: data, state or plan do not fit each other.
    """
    path = state_path(args.out)
    with states.locked(path):
        saved = _saved(path, args)
        settings = _settings(args)
        task = _task(args)
        model = calibrate.inspect_model(args)
        check_same_layers(task.uniform, model.layers)
        force = args.force_model
        task.notes = check_model(task.uniform, model.provenance, args.model, force=force)
        sources = _sources(args, model, console)
        args.folds = args.validation.denominator
        how = How(False, "device", _batch_sizes(args, model, sources, saved))
        state = SearchState(path, _identity(args, model, sources, how, task))
        if saved is not None:
            saved = state.resume()  # before anything else: it may be of another search
        else:
            state.remove()
        with running.holding(args, how, _ALONE, console) as held:
            model.check_unchanged()
            parts = _parts(args, model, sources, how)
            job = _Job(task, settings, state, saved, args.backend)
            yield _run(held.model, parts, job, console)
        state.remove()


def state_path(out: Path) -> Path:
    """Where the state of a search is, beside its output."""
    return out.absolute().with_name(f"{out.absolute().name}.search")


def _saved(path: Path, args: argparse.Namespace) -> Saved | None:
    """What an interrupted search left, where it is to go on.

    Raises:
        CheckpointError: there is something, and it is not said what to do with it.
        DataError: there is nothing.
    """
    if args.resume:
        return states.read(path)
    if path.exists() and not args.overwrite:
        raise CheckpointError(
            f"{path}: the state of a search that was interrupted; give --resume to go on from it, "
            "or --overwrite to start anew"
        )
    return None


def _settings(args: argparse.Namespace) -> Settings:
    evaluations = args.evaluations
    if args.generations is not None:
        evaluations = args.population + (args.generations - 1) * (args.population - args.elites)
    return Settings(evaluations, args.population, args.elites, args.seed)


def _task(args: argparse.Namespace) -> Task:
    stats = SaliencyStats.load(args.stats)
    scores = score(stats, args.criterion, args.weights)
    return Task(scores, ranking.planned(args, scores, stats))


def _sources(args: argparse.Namespace, model: Model, console: Console) -> list[PackedSource]:
    wanted = calibrate.sources_of(args)
    seq_len = calibrate.check_options(args, model.config)
    check_backend("compare", calibrate.device_of(args), model.meta.dtype, args.backend)
    calibrate.check_packing(args, model.meta.config, model.layers)
    model.check_files()
    return calibrate.read_data(args, wanted, model.config, seq_len, console)


def _batch_sizes(
    args: argparse.Namespace, model: Model, sources: Sequence[PackedSource], saved: Saved | None
) -> list[int]:
    """Sequences at a time, for each source: as before where a search is resumed.

    Raises:
        ResourceError: the model would have to be streamed.
    """
    if saved is not None and args.batch_size is None:
        return list(saved.run.get("batch sizes", []))
    size = args.batch_size or 1
    if args.device_map is None:
        decision = running.decided(args, model, sources, _ALONE, all_logits=True)
        size = decision.batch_size
        if decision.stream:
            raise ResourceError(
                "the model does not fit in memory, and a search runs it hundreds of times: "
                f"{'; '.join(decision.reasons)}; use a machine with more memory, several GPUs by "
                "--device-map auto, or --stream never to try"
            )
    return [min(size, source.full_sequences) for source in sources]


def _identity(
    args: argparse.Namespace,
    model: Model,
    sources: Sequence[PackedSource],
    how: How,
    task: Task,
) -> dict[str, Any]:
    """What must be the same for a search to go on; not for how long."""
    uniform = task.uniform
    return {
        **running.identity(args, model, sources, how, _ALONE),
        "validation": str(args.validation),
        "scores": uniform.scores_digest,
        "ratio": uniform.ratio,
        "settings": uniform.settings,
        "population": args.population,
        "elites": args.elites,
    }


Batches = list[dict[str, Tensor]]


def _parts(
    args: argparse.Namespace, model: Model, sources: Sequence[PackedSource], how: How
) -> tuple[Batches, Batches]:
    """Batches to search on, and those that are held out.

    Raises:
        DataError: there are too few sequences for both.
    """
    share = args.validation
    packed = calibrate.batches_of(
        model.config, model.layers, sources, how.batch_sizes, share.denominator
    )
    parts: tuple[Batches, Batches] = ([], [])
    for number in range(len(packed)):
        parts[packed.fold(number) < share.numerator].append(packed.inputs(number))
    if not parts[0] or (share and not parts[1]):
        sequences = sum(source.sequences for source in sources)
        raise DataError(
            f"the data is {sequences} sequences, too few to hold out {share} of them; give more, "
            "a smaller --seq-len, or --validation 0"
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
    model: PreTrainedModel, parts: tuple[Batches, Batches], job: _Job, console: Console
) -> tuple[Found, dict[str, Any]]:
    """Searches with a model that is loaded."""
    masks, settings = RouterMasks(model), job.settings
    fitness = Fitness(model, parts[0], masks, backend=job.backend)
    console.note(
        f"the full model's logits for {fitness.predictions:,} predictions take "
        f"{in_bytes(fitness.nbytes)} of memory"
    )
    text = "writing the state, then ending; press Ctrl-C again to end without"
    with (
        deferred(lambda: console.note(text)) as stop,
        console.progress("searching", " plans", settings.evaluations) as progress,
    ):
        saved = job.saved or Saved({}, {}, 0.0)
        known = dict(saved.evaluated)
        recorder = Recorder(
            fitness,
            job.task,
            job.state,
            stop,
            done=lambda: progress.add(1),
            known=known,
            seconds=saved.seconds,
        )
        progress.skip(min(len(known), settings.evaluations))
        found = search(recorder, settings)
    if parts[1]:
        plans = (job.task.uniform, found.plan)
        how: dict[str, Any] = {"masks": masks, "seed": settings.seed, "backend": job.backend}
        found = found.checked(held_out(model, parts[1], *plans, **how))
    costs = {
        "seconds": round(recorder.clock(), 3),
        "predictions": fitness.predictions,
        "cache_bytes": fitness.nbytes,
    }
    return found, costs
