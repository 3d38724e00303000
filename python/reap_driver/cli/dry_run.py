"""`--dry-run` of observe and prune, which estimates the run instead."""

import argparse
from dataclasses import dataclass

from reap_driver.cli.arguments import read
from reap_driver.workflow.console import Console
from reap_driver.workflow.fields import option, options, refused
from reap_driver.workflow.jobs import PLANNING, EstimateOptions
from reap_driver.workflow.options import WriteOptions
from reap_driver.workflow.rank_options import (
    RATIO,
    AllocationOptions,
    BudgetOptions,
    RankOptions,
)
from reap_driver.workflow.results import Result
from reap_driver.workflow.shape_options import ShapeOptions

# What only a run that prunes has.
PRUNING = (RankOptions, AllocationOptions, BudgetOptions, ShapeOptions, WriteOptions)


@options
@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The flag, which makes `--out` and `--data` optional and `--tokens` possible."""

    dry_run: bool = option(
        False,
        group=PLANNING,
        help="print what the run would read, hold and compute, and how long that takes at the "
        "rates measured here (or given by `machine`); write nothing. MODEL may have no weights, or "
        "be a config .json file; `out` may be left out",
    )


def estimated(
    args: argparse.Namespace, console: Console, *, pruning: bool = False
) -> Result | None:
    """What the run would take, and, with `pruning`, leave; None without `--dry-run`.

    Raises:
        OptionError: an option of the estimate without it.
    """
    if hasattr(args, "dry_run"):
        from reap_driver.workflow.estimate import estimate

        wanted = read(EstimateOptions, args)
        explicit = wanted.shape.explicit is not None
        if pruning and not wanted.rank.given and not explicit:  # also not by a recipe
            args.ratio = RATIO
            wanted = read(EstimateOptions, args)
        return estimate(wanted, console, pruning=pruning)
    refusals = {
        "tokens": "a real run counts the tokens of `data`",
        "machine": "a real run takes the machine it is on",
    }
    if pruning:
        refusals["gram"] = "a real run has its Gram matrices beside `out`"
        refusals["with_mtp"] = "a real run observes the layer where it prunes it (`mtp='prune'`)"
    for name, instead in refusals.items():
        if hasattr(args, name):
            raise refused(f"`{name}`: only with --dry-run; {instead}")
    return None
