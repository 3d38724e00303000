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
        "rates measured here; write nothing. MODEL may have no weights, or be a config .json file; "
        "`out` may be left out",
    )


def estimated(args: argparse.Namespace, console: Console) -> Result | None:
    """What the run would take; None without `--dry-run`.

    Raises:
        OptionError: `--tokens` without it.
    """
    if hasattr(args, "dry_run"):
        from reap_driver.workflow.estimate import estimate

        return estimate(read(EstimateOptions, args), console)
    if hasattr(args, "tokens"):
        raise refused("`tokens`: only with --dry-run; a real run counts the tokens of `data`")
    return None
