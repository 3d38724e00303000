"""The options of jobs on pruned models: re-fitting, comparing, reporting."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from reap_driver.workflow.fields import group_of, option, options, refused
from reap_driver.workflow.jobs import PLANNING, REFIT, TASKS
from reap_driver.workflow.options import (
    DATA,
    DataOptions,
    RunOptions,
    check_positive,
    check_resume,
    read_count,
)
from reap_driver.workflow.shape_options import check_ridge
from reap_driver.workflow.single_options import (
    force_option,
    hold_out_option,
    model_option,
    needs_data,
    overwrite_option,
    set_names,
    set_paths,
    stats_option,
)

if TYPE_CHECKING:  # it imports torch, and --help must not
    from reap_kernels import SaliencyStats


@options
@dataclass(frozen=True, kw_only=True)
class RefitOptions:
    """Solving the down projections of a pruned model again.

    Example:
        >>> data = rd.DataOptions(data="code.jsonl")
        >>> rd.RefitOptions(pruned="CUT", original="MODEL", out="refitted", data=data).steps
        2
    """

    pruned: str | Path = option(
        metavar="PRUNED",
        positional=True,
        help="the pruned checkpoint, as folder or hub id; any tool may have made it",
    )
    original: str | Path = option(
        metavar="MODEL", help="the model that it was made from, as folder or hub id"
    )
    out: str | Path | None = option(None, metavar="DIR", help="folder of the new checkpoint")
    overwrite: bool = overwrite_option()
    steps: int = option(
        2,
        metavar="N",
        group=REFIT,
        about="Of eight sequences of each source, six are fitted, one chooses ridges and judges\n"
        "each layer, and one, which neither has seen, evaluates the outcome.",
        help="steps of conjugate gradients in each layer",
    )
    ridge: float | None = option(
        None,
        metavar="R",
        group=REFIT,
        help="how much every layer is kept close to its old down projections, relative to the mean "
        "of the Gram matrices' diagonals (default: for each layer, what judges best)",
    )
    validate: str | Path | Sequence[str | Path] = option(
        (),
        metavar="[GROUP=]SOURCE[:N]",
        group=REFIT,
        recipe=False,
        help="evaluate on this text instead of the eighth that is left for it; several sources can "
        "be given",
    )
    keep_refit: bool = option(
        False,
        group=REFIT,
        help="write the re-fitted model also where the pruned one has the higher expected "
        "acceptance; otherwise the pruned one is then copied",
    )
    resume: bool | Literal["auto"] = option(
        False,
        group=REFIT,
        recipe=False,
        help="go on where an interrupted re-fit stopped, whose layers are in OUT.refit; the "
        "outcome has the bits of one that was never interrupted. `resume='auto'` also begins where "
        "there is nothing to go on from, and does nothing where this command has completed its "
        "output",
    )
    data: DataOptions = group_of(DataOptions)
    hold_out_group: str | Sequence[str] = hold_out_option()
    run: RunOptions = group_of(RunOptions)
    dry_run: bool = option(
        False,
        group=PLANNING,
        help="print what the run would read, hold and compute, and write nothing; `out` may be "
        "left out",
    )

    def __post_init__(self) -> None:
        set_paths(self)
        set_names(self, "hold_out_group", "validate")
        check_positive(self, "steps")
        needs_data(self.data)
        if self.ridge is not None:
            check_ridge(self.ridge)
        if self.run.device_map is not None:
            raise refused(
                f"`device_map={self.run.device_map}`: a re-fit goes through the models layer by "
                "layer, each read once; leave it out"
            )
        if self.out is None and not self.dry_run:
            raise refused("`out` is required: the folder of the new checkpoint")
        check_resume(self.resume, self.out, "layers so far")

    @property
    def texts(self) -> tuple[str, ...]:
        """`validate` as a tuple of texts, which it is once checked."""
        return cast("tuple[str, ...]", self.validate)


@options
@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Comparing pruned models with their original.

    Example:
        >>> data = rd.DataOptions(data="code.jsonl")
        >>> rd.CompareOptions(model="MODEL", pruned="plan.json", data=data).draws
        2000
    """

    model: str | Path = model_option(metavar="ORIGINAL")
    pruned: Any = option(
        metavar="PRUNED",
        positional=True,
        help="checkpoint folder or hub id; or a plan, as a file; or several, each compared with "
        "the original and with the first",
    )
    force_model: bool = force_option()
    data: DataOptions = group_of(DataOptions)
    tokens: int | str | None = option(
        None,
        metavar="N",
        group=DATA,
        exclusive="limit",
        help="of every source without a budget of its own, a random sample of N tokens",
    )
    sequences: int | None = option(
        None, metavar="N", group=DATA, exclusive="limit", help="the same, N sequences"
    )
    run: RunOptions = group_of(RunOptions)
    tasks: Sequence[str] = option(
        (),
        metavar="A,B",
        group=TASKS,
        about="All models are handed to lm-evaluation-harness (extra `eval`).",
        help="names of its tasks",
    )
    task_folder: str | Path | None = option(
        None, metavar="DIR", group=TASKS, help="where more tasks are, as its .yaml files"
    )
    apply_chat_template: bool = option(
        False, group=TASKS, help="put questions through the chat template"
    )
    limit: int | None = option(
        None, metavar="N", group=TASKS, help="questions of each task (default: all)"
    )
    draws: int = option(2000, metavar="N", help="draws of the bootstrap that intervals come from")

    def __post_init__(self) -> None:
        set_paths(self)
        read_count(self, "tokens")
        check_positive(self, "sequences", "limit", "draws")
        if not self.tasks:
            needs_data(self.data, ", `recipe` or `tasks`")
        if self.tokens is not None and self.sequences is not None:
            raise refused("`tokens`: not together with `sequences`; give one of them")
        if self.several:
            if not self.pruned:
                raise refused("`pruned`: names no model and no plan; give at least one")
            named = isinstance(self.pruned, dict)
            each = self.pruned.items() if named else ((None, one) for one in self.pruned)
            kept = ((name, str(one) if isinstance(one, Path) else one) for name, one in each)
            object.__setattr__(self, "pruned", dict(kept) if named else tuple(x for _, x in kept))

    @property
    def several(self) -> bool:
        """Whether several pruned models were given, were it a list or a dictionary of one."""
        return isinstance(self.pruned, list | tuple | dict)

    @property
    def each(self) -> tuple[tuple[str | None, Any], ...]:
        """The pruned models, once checked, each with the name that it was given, if any."""
        if isinstance(self.pruned, dict):
            return tuple(self.pruned.items())
        return tuple((None, one) for one in (self.pruned if self.several else (self.pruned,)))

    @property
    def token_count(self) -> int | None:
        """`tokens` as a number, which it is once checked."""
        return cast("int | None", self.tokens)


@options
@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Showing statistics and a plan as one HTML page and pictures.

    Example:
        >>> rd.ReportOptions(stats="stats.safetensors", out="page").plan is None
        True
    """

    stats: "str | Path | SaliencyStats" = stats_option()
    plan: Any = option(
        None, metavar="PLAN", positional=True, help="a plan of the same: the file `plan` wrote"
    )
    out: str | Path = option(metavar="DIR", help="folder for the page and pictures")
    criterion: str | None = option(
        None,
        metavar="NAME",
        help="whose scores are shown (default: the plan's, or reap); `plan --help` lists them",
    )
    compare: Any = option(
        None, metavar="FILE", help="show this comparison too: the output of `compare --json`"
    )
    overwrite: bool = overwrite_option()

    def __post_init__(self) -> None:
        set_paths(self)
