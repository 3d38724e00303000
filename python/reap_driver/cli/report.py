"""`reap-kernels report`: a page and pictures of statistics and a plan."""

import argparse

from reap_driver.cli.arguments import add, read
from reap_driver.workflow.console import Console
from reap_driver.workflow.follow_up_jobs import ReportOptions
from reap_driver.workflow.results import Result

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
  reap-kernels compare MODEL MODEL-half --data held-out.jsonl \\
      --json > compare.json
  reap-kernels report stats.safetensors plan.json --compare compare.json \\
      --out report
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Statistics, plan, comparison, output."""
    add(parser, ReportOptions)


def run(args: argparse.Namespace, console: Console) -> Result:
    """Reads, draws, writes."""
    options = read(ReportOptions, args)
    from reap_driver.workflow.report import report

    return report(options, console)
