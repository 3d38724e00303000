"""`--dry-run` of observe and prune, which estimates the run instead."""

import argparse
from dataclasses import dataclass

from reap_driver.cli.arguments import read
from reap_driver.workflow.console import Console
from reap_driver.workflow.fields import option, options, refused
from reap_driver.workflow.jobs import PLANNING, EstimateOptions
from reap_driver.workflow.results import Result


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


def estimated(args: argparse.Namespace, console: Console) -> Result | None:
    """What the run would take; None without `--dry-run`.

    Raises:
        OptionError: an option of the estimate without it.
    """
    if hasattr(args, "dry_run"):
        from reap_driver.workflow.estimate import estimate

        return estimate(read(EstimateOptions, args), console)
    for name, instead in (
        ("tokens", "a real run counts the tokens of `data`"),
        ("machine", "a real run takes the machine it is on"),
    ):
        if hasattr(args, name):
            raise refused(f"`{name}`: only with --dry-run; {instead}")
    return None
