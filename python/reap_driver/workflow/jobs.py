"""The options of each job; what jobs share is in `options`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from reap_driver.memory import given_machine as machines
from reap_driver.workflow.fields import every_field, flat, group_of, option, options, refused
from reap_driver.workflow.options import (
    DATA,
    RUN,
    DataOptions,
    JournalOptions,
    RunOptions,
    WriteOptions,
    check_positive,
    check_resume,
    read_count,
    trust_option,
)
from reap_driver.workflow.rank_options import (
    AllocationOptions,
    BudgetOptions,
    RankOptions,
    check_context,
)
from reap_driver.workflow.shape_options import (
    ShapeOptions,
    check_gram,
    check_shape_alone,
    gram_option,
)
from reap_driver.workflow.single_options import (
    check_with_mtp,
    folds_option,
    force_option,
    fuse_option,
    hold_out_option,
    model_option,
    needs_data,
    overwrite_option,
    set_names,
    set_paths,
    stats_option,
    with_mtp_option,
)

if TYPE_CHECKING:  # it imports torch, and --help must not
    from reap_kernels import SaliencyStats

# Parts of the data of which some can be held out from a search, at most.
_MOST_FOLDS = 20
# Of a search over budgets.
_EVALUATIONS, _POPULATION, _ELITES = 500, 32, 4
_SEARCH, TASKS, PLANNING, REFIT = "search", "tasks", "planning", "re-fitting"


def _refit_option() -> Any:
    """Whether a cut is re-fitted."""
    return option(
        False,
        group=REFIT,
        help="then solve the down projections again on the data, and write the better of cut and "
        "re-fit, as the command refit does",
    )


def _check_no_map(run: RunOptions) -> None:
    """Raises OptionError for models spread over devices, which are not re-fitted."""
    if run.device_map is not None:
        raise refused(
            f"`device_map={run.device_map}`: not together with `refit`, which goes through the "
            "models layer by layer; leave it out"
        )


@options
@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Calibration data of a model, read, tokenized and packed.

    Example:
        >>> rd.CalibrationOptions(model="MODEL", data=rd.DataOptions(data="code.jsonl")).batch_size
        1
    """

    model: str | Path = model_option()
    trust_remote_code: bool = trust_option()
    batch_size: int = option(1, metavar="B", help="sequences at a time")
    data: DataOptions = group_of(DataOptions)

    def __post_init__(self) -> None:
        set_paths(self)
        check_positive(self, "batch_size")
        needs_data(self.data)


@options
@dataclass(frozen=True, kw_only=True)
class ObserveOptions:
    """Observing a model: run it on data and keep statistics of its experts.

    Example:
        >>> rd.ObserveOptions(model="MODEL", data=rd.DataOptions(data="code.jsonl")).folds
        8
    """

    model: str | Path = model_option()
    out: str | Path | None = option(None, metavar="FILE", help="where to save the statistics")
    gram: str | Path | None = option(
        None,
        metavar="DIR",
        help="also sum the Gram matrices of the experts' neurons, by which `plan --shape` and "
        "`search --shape` remove neurons, and save them in this folder, a file per layer; "
        "--dry-run says how much memory and disk they take",
    )
    with_mtp: bool = with_mtp_option()
    overwrite: bool = overwrite_option()
    data: DataOptions = group_of(DataOptions)
    hold_out_group: str | Sequence[str] = hold_out_option()
    folds: int = folds_option()
    fuse: bool | None = fuse_option()
    run: RunOptions = group_of(RunOptions)
    journal: JournalOptions = group_of(JournalOptions)

    def __post_init__(self) -> None:
        set_paths(self)
        set_names(self, "hold_out_group")
        check_positive(self, "folds")
        needs_data(self.data)
        check_resume(self.journal.resume, self.out, "journal")
        check_with_mtp(self.with_mtp, gram=self.gram, device_map=self.run.device_map)
        if self.gram is not None and self.out is None:
            raise refused(f"`gram={self.gram}`: needs `out`, where the statistics go")


@options
@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Making a plan from statistics.

    Example:
        >>> rd.PlanOptions(stats="stats.safetensors").rank.criterion
        'reap'
    """

    stats: "str | Path | SaliencyStats" = stats_option()
    model: str | Path | None = option(
        None,
        metavar="MODEL",
        help="with `target_size`, `fits` or `shape`: the model whose sizes or experts count, as "
        "checkpoint folder or hub id (default: the one that STATS name)",
    )
    trust_remote_code: bool = trust_option()
    out: str | Path | None = option(None, metavar="FILE", help="where to save the plan")
    overwrite: bool = overwrite_option()
    rank: RankOptions = group_of(RankOptions)
    allocation: AllocationOptions = group_of(AllocationOptions)
    budget: BudgetOptions = group_of(BudgetOptions)
    shape: ShapeOptions = group_of(ShapeOptions)
    gram: str | Path | None = gram_option()

    def __post_init__(self) -> None:
        set_paths(self)
        check_context(self.rank)
        if self.model is not None and self.rank.limit is None and self.shape.shape is None:
            raise refused(f"`model={self.model}`: only with `target_size`, `fits` or `shape`")
        check_shape_alone(self.shape, self.rank, self.budget, self.allocation)
        check_gram(self.shape, self.gram, self.out)


@options
@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Observing, planning and writing in one.

    Example:
        >>> data = rd.DataOptions(data="code.jsonl")
        >>> rd.PruneOptions(model="MODEL", out="half", data=data, rank=rd.RankOptions(keep=8)).folds
        8
    """

    model: str | Path = model_option()
    out: str | Path | None = option(None, metavar="DIR", help="folder of the new checkpoint")
    stats: str | Path | None = option(
        None,
        metavar="FILE",
        help="save the statistics here too, as soon as there are any: for long runs",
    )
    overwrite: bool = overwrite_option()
    rank: RankOptions = group_of(RankOptions)
    allocation: AllocationOptions = group_of(AllocationOptions)
    budget: BudgetOptions = group_of(BudgetOptions)
    shape: ShapeOptions = group_of(ShapeOptions)
    refit: bool = _refit_option()
    data: DataOptions = group_of(DataOptions)
    hold_out_group: str | Sequence[str] = hold_out_option()
    folds: int = folds_option()
    fuse: bool | None = fuse_option()
    run: RunOptions = group_of(RunOptions)
    journal: JournalOptions = group_of(JournalOptions)
    write: WriteOptions = group_of(WriteOptions)

    def __post_init__(self) -> None:
        set_paths(self)
        set_names(self, "hold_out_group")
        check_positive(self, "folds")
        check_context(self.rank)
        check_shape_alone(self.shape, self.rank, self.budget, self.allocation)
        needs_data(self.data)
        if self.out is None:
            raise refused("`out` is required: the folder of the new checkpoint")
        if self.refit:
            _check_no_map(self.run)


@options
@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """What observing a model would take, and what pruning would leave, without running it.

    Example:
        >>> rd.EstimateOptions(model="MODEL", tokens=24_000_000).run.stream
        'auto'
    """

    model: str | Path = model_option(
        "checkpoint folder, hub id or config .json file; needs no weights"
    )
    tokens: int | str | None = option(
        None,
        metavar="N",
        group=PLANNING,
        help="plan for N tokens, such as 24M, instead of reading data",
    )
    machine: str | None = option(
        None,
        metavar="MACHINE",
        group=PLANNING,
        help="plan for a machine that is not this one, such as 1xH200-141GB,ram=128GB,disk=2GB/s: "
        "N GPUs by name and memory of each, or cpu; then, of what is known, ram and free (on the "
        "disk) as sizes, the rates disk (of reading), copy (from host to GPU), and flops, such as "
        "400T, of one GPU; what is left out is unknown. N GPUs are N ranks of torchrun",
    )
    out: str | Path | None = option(None, metavar="PATH", help="where the run would write")
    gram: str | Path | None = option(
        None, metavar="DIR", help="where the run would write Gram matrices, as in `observe_data`"
    )
    with_mtp: bool = with_mtp_option()
    data: DataOptions = group_of(DataOptions)
    hold_out_group: str | Sequence[str] = hold_out_option()
    run: RunOptions = group_of(RunOptions)
    rank: RankOptions = group_of(RankOptions)
    allocation: AllocationOptions = group_of(AllocationOptions)
    budget: BudgetOptions = group_of(BudgetOptions)
    shape: ShapeOptions = group_of(ShapeOptions)
    write: WriteOptions = group_of(WriteOptions)

    def __post_init__(self) -> None:
        set_paths(self)
        set_names(self, "hold_out_group")
        read_count(self, "tokens")
        check_shape_alone(self.shape, self.rank, self.budget, self.allocation)
        check_with_mtp(self.with_mtp, gram=self.gram, device_map=self.run.device_map)
        self._check_machine()
        if self.tokens is not None and self.data.given:
            named = "data" if self.data.data else "recipe"
            raise refused(
                f"`tokens={self.tokens}`: not together with `{named}`, whose tokens are counted"
            )
        if self.tokens is None and not self.data.given:
            raise refused("no data to plan for; give `tokens`, or the `data` to count them in")

    @property
    def token_count(self) -> int | None:
        """`tokens` as a number, which it is once checked."""
        return cast("int | None", self.tokens)

    @property
    def given_machine(self) -> machines.GivenMachine | None:
        """The machine that `machine` describes."""
        return None if self.machine is None else machines.parse_machine(self.machine)

    def _check_machine(self) -> None:
        if self.run.device_map is not None:
            raise refused(
                f"`device_map={self.run.device_map}`: nothing is estimated of a model spread over "
                "devices; leave it out"
            )
        try:
            given = self.given_machine
        except ValueError as error:
            raise refused(f"`machine={self.machine}`: {error}") from error
        if given is None:
            return
        if self.run.device not in ("auto", given.kind):
            raise refused(
                f"`device={self.run.device}`: `machine={self.machine}` computes on {given.kind}; "
                "leave `device` out"
            )
        if self.run.backend is not None:
            raise refused(
                f"`backend={self.run.backend}`: not together with `machine`; whether a backend "
                "runs there is not known here; leave it out"
            )


@options
@dataclass(frozen=True, kw_only=True)
class ApplyOptions:
    """Writing the checkpoint that a plan leaves of a model, or the plan as masks.

    Example:
        >>> rd.ApplyOptions(model="MODEL", plan="plan.json", out="half").write.non_uniform
        False
    """

    model: str | Path = model_option()
    plan: Any = option(metavar="PLAN", positional=True, help="a plan: the file `plan` wrote")
    out: str | Path | None = option(
        None, metavar="DIR", exclusive="output", help="folder of the new checkpoint"
    )
    as_masks: str | Path | None = option(
        None,
        metavar="FILE",
        exclusive="output",
        help="write no checkpoint but a safetensors file of one bool tensor [E] per layer: the "
        "experts its router may choose",
    )
    matrices: str | Path | None = option(
        None,
        metavar="DIR",
        help="folder of the plan's new down projections, for plans that leave experts fewer "
        "neurons (default: PLAN.matrices beside PLAN.json)",
    )
    overwrite: bool = overwrite_option()
    force_model: bool = force_option()
    write: WriteOptions = group_of(WriteOptions)
    refit: bool = _refit_option()
    resume: bool | Literal["auto"] = option(
        False,
        group=REFIT,
        recipe=False,
        help="go on where an interrupted run stopped: the cut is in OUT.cut, and is written again, "
        "layers that are re-fitted are in OUT.refit. `resume='auto'` also begins where there is "
        "nothing to go on from, and leaves an output that this command has completed",
    )
    data: DataOptions = group_of(DataOptions)
    hold_out_group: str | Sequence[str] = hold_out_option()
    run: RunOptions = group_of(RunOptions)

    def __post_init__(self) -> None:
        set_paths(self)
        set_names(self, "hold_out_group")
        if (self.out is None) == (self.as_masks is None):
            raise refused("give one of `out` and `as_masks`")
        if self.matrices is not None and self.out is None:
            raise refused("`matrices` change experts, which masks cannot; give `out`")
        if not self.refit:
            self._check_no_refit()
            return
        if self.as_masks is not None:
            raise refused("`refit`: changes experts, which masks cannot; give `out`")
        needs_data(self.data)
        _check_no_map(self.run)

    def _check_no_refit(self) -> None:
        """Raises OptionError for options that only a re-fit has a use for."""
        values = flat(self)
        for field in every_field(type(self)):
            of_refit = field.metadata["group"] in (REFIT, DATA, RUN)
            if not of_refit or field.name == "trust_remote_code":
                continue
            value = values[field.name]
            if value != field.default:
                shown = ", ".join(value) if isinstance(value, tuple) else value
                raise refused(
                    f"`{field.name}={shown}`: only with `refit`, which runs the model; give both "
                    "or neither"
                )


@options
@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Searching how many experts each layer should lose, or which shape all should have.

    Example:
        >>> data = rd.DataOptions(data="code.jsonl")
        >>> rd.SearchOptions(model="MODEL", stats="stats.safetensors", data=data).share
        Fraction(1, 2)
    """

    model: str | Path = model_option()
    stats: "str | Path | SaliencyStats" = stats_option()
    out: str | Path | None = option(None, metavar="FILE", help="where to save the plan")
    overwrite: bool = overwrite_option()
    force_model: bool = force_option()
    rank: RankOptions = group_of(RankOptions)
    budget: BudgetOptions = group_of(BudgetOptions)
    shape: ShapeOptions = group_of(ShapeOptions)
    gram: str | Path | None = gram_option()
    evaluations: int = option(
        _EVALUATIONS,
        metavar="N",
        group=_SEARCH,
        about="`seed` is of the search, too. With `shape` only `validation` and `resume` apply.",
        exclusive="length",
        help="plans to try",
    )
    generations: int | None = option(
        None, metavar="N", group=_SEARCH, exclusive="length", help="the same, in generations"
    )
    population: int = option(_POPULATION, metavar="N", group=_SEARCH, help="plans in a generation")
    elites: int = option(
        _ELITES,
        metavar="N",
        group=_SEARCH,
        help="the best of them, from which the next ones are made",
    )
    validation: float = option(
        0.5,
        metavar="SHARE",
        group=_SEARCH,
        help="share of the sequences that are held out from the search; 0 for none",
    )
    resume: bool | Literal["auto"] = option(
        False,
        group=_SEARCH,
        recipe=False,
        help="go on where an interrupted search stopped, whose state is in OUT.search; the outcome "
        "has the bits of one that was never interrupted. `resume='auto'` also begins where there "
        "is no state, and does nothing where this command has found its plan",
    )
    data: DataOptions = group_of(DataOptions)
    run: RunOptions = group_of(RunOptions)

    def __post_init__(self) -> None:
        set_paths(self)
        check_positive(self, "evaluations", "generations", "population", "elites")
        check_context(self.rank)
        needs_data(self.data)
        if self.run.stream == "always":
            raise refused(
                "`stream='always'`: a search needs the whole model in memory; leave it out"
            )
        if self.elites >= self.population:
            raise refused(
                f"`elites={self.elites}`: give fewer than the population of {self.population}"
            )
        self.share  # noqa: B018 - refuses a share that cannot be held out
        check_resume(self.resume, self.out, "search's state")
        self._check_shape()
        check_shape_alone(self.shape, self.rank, self.budget)
        check_gram(self.shape, self.gram, self.out)

    def _check_shape(self) -> None:
        """Raises OptionError for options of another search than that over shapes."""
        shape = self.shape.shape
        if shape is None:
            return
        if self.shape.explicit is not None:
            raise refused(
                f"`shape={shape}`: a search finds the shape; give auto, or plan with this one"
            )
        for name, usual in (
            ("evaluations", _EVALUATIONS),
            ("generations", None),
            ("population", _POPULATION),
            ("elites", _ELITES),
        ):
            value = getattr(self, name)
            if value != usual:
                raise refused(
                    f"`{name}={value}`: not together with `shape`, of which few are tried; leave "
                    "it out"
                )

    @property
    def share(self) -> Fraction:
        """`validation` as the nearest fraction with a small denominator."""
        value = self.validation
        near = Fraction(value).limit_denominator(_MOST_FOLDS) if math.isfinite(value) else None
        if near is None or not 0 <= near < 1 or (near == 0 and value != 0):
            raise refused(
                f"`validation={value}`: give 0, or a share from {1 / _MOST_FOLDS} to "
                f"{1 - 1 / _MOST_FOLDS}"
            )
        return near
