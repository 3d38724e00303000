"""`reap-kernels report`: a page and pictures of statistics and a plan."""

import argparse
from pathlib import Path
from typing import Any

from reap_driver.cli import options
from reap_driver.cli.console import Console

NAME = "report"
SUMMARY = "show statistics and a plan as one HTML page and pictures"
DESCRIPTION = """\
Draws what was observed and what a plan makes of it: every expert's score with the cut, the load,
dead experts, which experts serve which calibration group, how clear the decision is, and what it
keeps of the routing. Writes DIR/report.html, which needs no other file and no network, and its
pictures as PNG files.
"""
EXAMPLES = """\
examples:
  reap-kernels report stats.safetensors plan.json --out report
  reap-kernels report stats.safetensors --criterion frequency --out report
  reap-kernels compare MODEL MODEL-half --data held-out.jsonl --json > compare.json
  reap-kernels report stats.safetensors plan.json --compare compare.json --out report
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Statistics, plan, comparison, output."""
    parser.add_argument("stats", type=Path, metavar="STATS", help="file that `observe` wrote")
    parser.add_argument(
        "plan", type=Path, nargs="?", metavar="PLAN", help="file that `plan` wrote, of the same"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the page and pictures"
    )
    parser.add_argument(
        "--criterion",
        metavar="NAME",
        help="whose scores are shown (default: the plan's, or reap); `plan --help` lists them",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="show this output of `compare --json` too",
    )
    options.add_overwrite(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Reads, draws, writes."""
    from reap_driver.cli.outputs import check_folder, inputs_of
    from reap_driver.plan.plan import Plan
    from reap_driver.reporting.comparison import read_comparison
    from reap_driver.reporting.page import FILES, write_report
    from reap_kernels import SaliencyStats

    check_folder(args.out, FILES, overwrite=args.overwrite, inputs=inputs_of(args, args.out))
    stats = SaliencyStats.load(args.stats)
    plan = None if args.plan is None else Plan.load(args.plan)
    comparison = None if args.compare is None else read_comparison(args.compare)
    args.out.mkdir(exist_ok=True)
    written = write_report(stats, args.out, plan, criterion=args.criterion, comparison=comparison)
    console.say(f"wrote {written.page} and {len(written.pictures)} pictures beside it")
    return {"out": str(args.out), "files": [str(path) for path in written]}
