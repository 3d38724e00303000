"""`reap-kernels refit`: give a pruned model back a part of what the cut took from its output."""

import argparse
import shlex

from reap_driver.cli.arguments import add, read
from reap_driver.workflow.console import Console
from reap_driver.workflow.follow_up_jobs import RefitOptions
from reap_driver.workflow.results import Result

NAME = "refit"
SUMMARY = "solve a pruned model's down projections again, by its original"
DESCRIPTION = """\
Runs the pruned model and its original side by side, layer by layer, and changes the down
projections of the experts that are left, so that each layer's output comes closest to the
original's: linear least squares, no training. Nothing else changes, neither names nor shapes nor
dtypes, so whatever loads PRUNED loads the result.

PRUNED may be made by any tool that keeps the rows of routers; by them it is checked that it is a
cut of this original. Quantized weights cannot be solved again; re-fit before quantizing.

Then perplexity, KL divergence and expected acceptance (see `compare`) are measured before and after
on text that was not fitted, overall and for each group. The better one by expected acceptance is
written: where the re-fit is no better, DIR holds PRUNED as it was. The model card and
DIR/reap/refit.json say which one it is, with all figures; `report --compare` draws that file.
"""
EXAMPLES = """\
examples:
  reap-kernels refit MODEL-half --original MODEL --data code.jsonl \\
      --out MODEL-refit
  reap-kernels refit MODEL-half --original MODEL --data code.jsonl \\
      --data chat.jsonl --hold-out-group chat --out MODEL-refit
  reap-kernels refit MODEL-half --original MODEL --data code.jsonl \\
      --validate held-out.jsonl --out MODEL-refit --resume auto
  reap-kernels refit MODEL-half --original MODEL --data code.jsonl --dry-run
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Models, data, re-fit, output."""
    add(parser, RefitOptions)


def run(args: argparse.Namespace, console: Console) -> Result | None:
    """Re-fits, or says what that would take."""
    options = read(RefitOptions, args)
    from reap_driver.workflow.refit import refit
    from reap_driver.workflow.refit_results import Refitted

    found = refit(options, console)
    if isinstance(found, Refitted):
        words = ["reap-kernels", "compare", str(options.original), str(found.out)]
        console.say(f"next: {shlex.join(words)} --data OTHER-TEXT")
    return found
