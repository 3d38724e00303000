"""`--dry-run` of observe and prune."""

import argparse

from reap_driver.workflow.fields import refused


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The flag, which makes `--out` and `--data` optional and `--tokens` possible."""
    parser.add_argument_group("planning").add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would read, hold and compute, and how long that takes at the "
        "rates measured here; write nothing. MODEL may have no weights, or be a config .json file; "
        "--out may be left out",
    )


def dry(args: argparse.Namespace) -> bool:
    """Whether it was given.

    Raises:
        OptionError: it was not, though `--tokens` was.
    """
    if not args.dry_run and hasattr(args, "tokens"):
        raise refused("`tokens`: only with --dry-run; a real run counts the tokens of `data`")
    return bool(args.dry_run)
