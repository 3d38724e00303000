"""`reap-kernels demo`: prune the bundled model and measure what it costs."""

import argparse
from pathlib import Path
from typing import Any

from reap_driver.base.library_bars import no_library_bars
from reap_driver.workflow.console import Console

NAME = "demo"
SUMMARY = "prune a small bundled model and show what it costs"
DESCRIPTION = """\
Prunes the small model that comes with reap-kernels at 25 % and 50 %, by REAP, by frequency and at
random, and prints held-out perplexity and agreement with the unpruned model for each. Saves a
picture of the scores and the pruned checkpoints. Needs no network, no GPU, and about a minute.
"""
EXAMPLES = """\
examples:
  reap-kernels demo
  reap-kernels demo --out /tmp/demo --seed 1
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """--out and --seed."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("reap-demo"),
        metavar="DIR",
        help="folder for the results, which are replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random baseline and the sample (default: 0)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs the demo, which prints its own table."""
    from reap_driver.demo.run import FILES, run_demo
    from reap_driver.workflow.outputs import check_folder

    if args.out.is_dir():
        check_folder(args.out, FILES, overwrite=True, inputs=[])

    with no_library_bars():  # it loads small models several times
        return run_demo(args.out, seed=args.seed, quiet=console.quiet or console.as_json)
