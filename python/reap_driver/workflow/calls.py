"""The jobs as plain functions of Python: keywords in, a typed result out.

Every keyword is a flag of the command line, written with underscores; `help(rd.prune)` shows them
all with their defaults, and the classes of options say what each does.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reap_driver.workflow import apply as applying
from reap_driver.workflow import calibration as calibrating
from reap_driver.workflow import compare as comparing
from reap_driver.workflow import estimate as estimating
from reap_driver.workflow import observe as observing
from reap_driver.workflow import plan as plans
from reap_driver.workflow import prune as pruning
from reap_driver.workflow import prune_refit
from reap_driver.workflow import refit as refitting
from reap_driver.workflow import report as reporting
from reap_driver.workflow import search as searching
from reap_driver.workflow.comparison_results import Compared, Comparisons
from reap_driver.workflow.complete import Complete
from reap_driver.workflow.console import Console
from reap_driver.workflow.errors import OptionError
from reap_driver.workflow.fields import every_field
from reap_driver.workflow.follow_up_jobs import CompareOptions, RefitOptions, ReportOptions
from reap_driver.workflow.jobs import (
    ApplyOptions,
    CalibrationOptions,
    EstimateOptions,
    ObserveOptions,
    PlanOptions,
    PruneOptions,
    SearchOptions,
)
from reap_driver.workflow.listener import Callback, Listener, Progress
from reap_driver.workflow.recipes import build
from reap_driver.workflow.refit_estimate import RefitEstimate
from reap_driver.workflow.refit_results import Refitted
from reap_kernels import SaliencyStats

Heard = bool | Listener | Callable[[Progress], Any] | None
_Call = TypeVar("_Call", bound=Callable[..., Any])


def listener_of(progress: Heard) -> Listener:
    """The listener that `progress` stands for; see `prune`."""
    if progress is None or progress is False:
        return Listener()
    if progress is True:
        return Console()
    if isinstance(progress, Listener):
        return progress
    if callable(progress):
        return Callback(progress)
    raise OptionError(
        f"progress is a {type(progress).__name__}; give True to print, or a function of Progress"
    )


def job_call(options: type) -> Callable[[_Call], _Call]:
    """Shows the options of a class in a function's signature, where it has `**options`."""

    def shown(function: _Call) -> _Call:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        more = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
            for field in every_field(options)
            if field.name not in names
        ]

        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        function.options = options  # type: ignore[attr-defined]
        return function

    return shown


@job_call(PruneOptions)
def prune(
    model: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    ratio: float | None = None,
    *,
    out: str | Path,
    progress: Heard = None,
    **options: Any,
) -> pruning.Pruned | Refitted | Complete | None:
    """Prunes a model: observes it on data, ranks its experts, writes a smaller checkpoint.

    What `reap-kernels prune` does, with the same checks, files and errors.

    Args:
        model: checkpoint folder or hub id.
        data: sources of calibration data, each `[group=]SOURCE[:N]`.
        ratio: share of experts to remove, above 0 and below 1, default 0.5; or give `keep`,
            `target_size`, `fits` or a `shape`.
        out: folder of the new checkpoint.
        progress: True prints progress and notes as the command line does; or a function that is
            called with a `Progress`.
        **options: of `PruneOptions` and the classes it holds.

    Returns:
        Statistics, plan and report of the writer, and with `refit` what came of that; only the
        latter where the cut was complete before; `Complete` where `resume="auto"` found the output
        complete; None on ranks of torchrun other than the first.

    Raises:
        OptionError: options are unknown or contradict each other.
        ReapError: bad data, a model that cannot be pruned, no room; see `reap_kernels.errors`.

    Example:
        >>> pruned = rd.prune("MODEL", data=["code.jsonl:50"], ratio=0.5, out="MODEL-half")
        >>> len(pruned.planned.plan.kept["model.layers.0.mlp.experts"])  # of 32 experts
        16
    """
    given = {"model": model, "data": data, "ratio": ratio, "out": out, **options}
    return prune_refit.prune(build(PruneOptions, given), listener_of(progress))


@job_call(ObserveOptions)
def observe_data(
    model: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    progress: Heard = None,
    **options: Any,
) -> observing.Observed | Complete | None:
    """Observes a model on data: what `reap-kernels observe` does.

    For a model that is in memory, and batches of your own, there is `observe`.

    Args:
        model: checkpoint folder or hub id.
        data: sources of calibration data, each `[group=]SOURCE[:N]`.
        out: where the statistics are saved, and a journal on the way; None: nowhere.
        progress: see `prune`.
        **options: of `ObserveOptions` and the classes it holds.

    Returns:
        Statistics and how long it took; `Complete` where `resume="auto"` found them complete; None
        on ranks of torchrun other than the first.

    Raises:
        OptionError, ReapError: see `prune`.

    Example:
        >>> observed = rd.observe_data("MODEL", data=["code.jsonl:50"], seq_len=128)
        >>> observed.stats.groups
        ['code']
    """
    given = {"model": model, "data": data, "out": out, **options}
    return observing.observe_data(build(ObserveOptions, given), listener_of(progress))


@job_call(PlanOptions)
def plan(
    stats: str | Path | SaliencyStats,
    ratio: float | None = None,
    *,
    out: str | Path | None = None,
    progress: Heard = None,
    **options: Any,
) -> plans.Planned:
    """Plans which experts go: what `reap-kernels plan` does.

    For scores of your own there is `make_plan`.

    Args:
        stats: statistics, or their file.
        ratio: share of experts to remove, above 0 and below 1, default 0.5; or give `keep`,
            `target_size`, `fits` or, with `gram`, a `shape`.
        out: where the plan is saved, and beside it the matrices that a `shape` needs; None:
            nowhere.
        progress: see `prune`.
        **options: of `PlanOptions` and the classes it holds.

    Raises:
        OptionError, ReapError: see `prune`.

    Example:
        >>> planned = rd.plan("stats.safetensors", 0.25, protect="super")
        >>> planned.plan.ratio
        0.25
    """
    given = {"stats": stats, "ratio": ratio, "out": out, **options}
    return plans.make(build(PlanOptions, given), listener_of(progress))


@job_call(ApplyOptions)
def apply(
    model: str | Path,
    plan: Any,
    *,
    out: str | Path | None = None,
    progress: Heard = None,
    **options: Any,
) -> applying.Applied | applying.Masked | Complete | None:
    """Writes the checkpoint that a plan leaves: what `reap-kernels apply` does.

    Args:
        model: checkpoint folder or hub id.
        plan: a plan, or its file.
        out: folder of the new checkpoint; or give `as_masks`.
        progress: see `prune`.
        **options: of `ApplyOptions` and the classes it holds; with `refit` the `data`, too.

    Returns:
        The report of the writer, and with `refit` what came of that; `Masked` with `as_masks`;
        `Complete` where `resume="auto"` found the output complete; with `refit`, None on ranks of
        torchrun other than the first.

    Raises:
        OptionError, ReapError: see `prune`.

    Example:
        >>> rd.apply("MODEL", "plan.json", out="smaller").report.experts_after  # of 32
        24
    """
    given = {"model": model, "plan": plan, "out": out, **options}
    return applying.apply(build(ApplyOptions, given), listener_of(progress))


@job_call(SearchOptions)
def search(
    model: str | Path,
    stats: str | Path | SaliencyStats,
    data: str | Path | Sequence[str | Path] = (),
    ratio: float | None = None,
    *,
    out: str | Path | None = None,
    progress: Heard = None,
    **options: Any,
) -> searching.Searched | Complete:
    """Searches how many experts each layer should lose, or with `shape='auto'` and `gram` how many
    experts and neurons all layers should keep: what `reap-kernels search` does.

    For a model and batches in memory there are `search_plan` and `search_shape`.

    Args:
        model: checkpoint folder or hub id.
        stats: statistics, or their file.
        data: text to search on, each `[group=]SOURCE[:N]`.
        ratio: share of experts to remove, above 0 and below 1, default 0.5; or give `keep`,
            `target_size` or `fits`. With `shape` it is of the weights of experts.
        out: where the plan is saved, and the state of the search on the way; None: nowhere. The
            matrices of a shape go beside it.
        progress: see `prune`.
        **options: of `SearchOptions` and the classes it holds.

    Returns:
        The plan and its figures; `Complete` where `resume="auto"` found the plan complete.

    Raises:
        OptionError, ReapError: see `prune`.

    Example:
        >>> found = rd.search("MODEL", "stats.safetensors", data=["code.jsonl:50"], seq_len=64,
        ...                   evaluations=4, population=2, elites=1)
        >>> found.plan.allocation
        'searched'
    """
    given = {"model": model, "stats": stats, "data": data, "ratio": ratio, "out": out, **options}
    return searching.search(build(SearchOptions, given), listener_of(progress))


@job_call(RefitOptions)
def refit(
    pruned: str | Path,
    original: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    progress: Heard = None,
    **options: Any,
) -> Refitted | RefitEstimate | Complete | None:
    """Solves a pruned model's down projections again: what `reap-kernels refit` does.

    For models and batches in memory there is `refit_models`.

    Args:
        pruned: the pruned checkpoint, folder or hub id.
        original: the model that it was made from, folder or hub id.
        data: sources of calibration data, each `[group=]SOURCE[:N]`.
        out: folder of the new checkpoint; None only with `dry_run`.
        progress: see `prune`.
        **options: of `RefitOptions` and the classes it holds.

    Returns:
        How each layer went, the figures before and after, and which one was written; with
        `dry_run` what the run would take; `Complete` where `resume="auto"` found the output
        complete; None on ranks of torchrun other than the first.

    Raises:
        OptionError, ReapError: see `prune`.
        CheckpointError: the pruned model is no cut of the original.
        UnsupportedModel: its weights are quantized; or a layer does more with its experts' output
            than to add a multiple of it to the residual stream.

    Example:
        >>> done = rd.refit("CUT", "MODEL", data=["code.jsonl:50"], out="refit", seq_len=64)
        >>> done.evaluation.gain.value > 0
        True
    """
    given = {"pruned": pruned, "original": original, "data": data, "out": out, **options}
    return refitting.refit(build(RefitOptions, given), listener_of(progress))


@job_call(CompareOptions)
def compare(
    model: str | Path,
    pruned: Any,
    data: str | Path | Sequence[str | Path] = (),
    *,
    progress: Heard = None,
    **options: Any,
) -> Compared | Comparisons:
    """Compares pruned models with their original: what `reap-kernels compare` does.

    For models and batches in memory there is `compare_models`.

    Args:
        model: the original, checkpoint folder or hub id.
        pruned: the pruned checkpoint; or a plan, or its file, by which routers are masked; or a
            list of such, or a dictionary that names them, for which the original runs once.
        data: text to compare on, each `[group=]SOURCE[:N]`.
        progress: see `prune`.
        **options: of `CompareOptions` and the classes it holds.

    Returns:
        The figures; of a list, `Comparisons`, which has them for each and their differences.

    Raises:
        OptionError, ReapError: see `prune`.

    Example:
        >>> own = rd.make_plan(rd.score(stats, "frequency"), ratio=0.5)
        >>> several = rd.compare("MODEL", {"reap": plan, "own": own}, "code.jsonl", seq_len=64)
        >>> [one.pruned for one in several.compared]
        ['reap', 'own']
        >>> compared = rd.compare("MODEL", "plan.json", data=["code.jsonl:50"], seq_len=64)
        >>> compared.comparison.overall.acceptance.value
        0.8...
    """
    given = {"model": model, "pruned": pruned, "data": data, **options}
    return comparing.compare(build(CompareOptions, given), listener_of(progress))


@job_call(ReportOptions)
def report(
    stats: str | Path | SaliencyStats,
    plan: Any = None,
    *,
    out: str | Path,
    progress: Heard = None,
    **options: Any,
) -> reporting.Reported:
    """Draws statistics and a plan as one HTML page and pictures: what `reap-kernels report` does.

    Args:
        stats: statistics, or their file.
        plan: a plan of them, or its file; None for statistics alone.
        out: folder for the page and the pictures.
        progress: see `prune`.
        **options: of `ReportOptions`.

    Raises:
        OptionError, ReapError: see `prune`.

    Example:
        >>> rd.report("stats.safetensors", "plan.json", out="report").files[0].name
        'report.html'
    """
    given = {"stats": stats, "plan": plan, "out": out, **options}
    return reporting.report(build(ReportOptions, given), listener_of(progress))


@job_call(CalibrationOptions)
def calibration(
    model: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    progress: Heard = None,
    **options: Any,
) -> calibrating.Calibration:
    """Reads calibration data as the jobs do, for a loop of your own.

    Args:
        model: checkpoint folder or hub id, whose tokenizer and chat template are used.
        data: sources of calibration data, each `[group=]SOURCE[:N]`.
        progress: see `prune`.
        **options: of `CalibrationOptions` and the class it holds.

    Returns:
        Batches: iterating gives the group and the model's arguments of each.

    Raises:
        OptionError, ReapError: see `prune`.

    Example:
        >>> with rd.observe(model) as obs:
        ...     for group, batch in rd.calibration("MODEL", data=["code.jsonl:50"]):
        ...         with obs.group(group):
        ...             obs(**batch)
    """
    given = {"model": model, "data": data, **options}
    return calibrating.calibration(build(CalibrationOptions, given), listener_of(progress))


@job_call(EstimateOptions)
def estimate(
    model: str | Path,
    tokens: int | None = None,
    *,
    progress: Heard = None,
    **options: Any,
) -> estimating.Estimate:
    """Says what observing a model would take, here or on another `machine`: what `--dry-run` does.

    With `ratio`, `keep`, `target_size` or `fits` it also says what pruning would leave.

    Args:
        model: checkpoint folder, hub id or config .json file; needs no weights.
        tokens: to plan for; or give the `data` to count them in.
        progress: see `prune`.
        **options: of `EstimateOptions` and the classes it holds.

    Raises:
        OptionError, ReapError: see `prune`.
        ResourceError: the model fits the machine in no way; `known` has the arithmetic.

    Example:
        >>> rd.estimate("MODEL", tokens=24_000_000).forecast.compute_seconds > 0
        True
        >>> rd.estimate("MODEL", tokens=1000, keep=16).leaves.experts["model.layers.0.mlp.experts"]
        (32, 16)
    """
    given = {"model": model, "tokens": tokens, **options}
    return estimating.estimate(build(EstimateOptions, given), listener_of(progress))
