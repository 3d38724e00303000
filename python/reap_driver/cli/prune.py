"""`reap-kernels prune`: observe, plan and apply in one."""

import argparse
import shlex

from reap_driver.cli.arguments import add, read, require
from reap_driver.cli.dry_run import DryRun, estimated
from reap_driver.workflow.console import Console
from reap_driver.workflow.fields import refused
from reap_driver.workflow.jobs import EstimateOptions, PruneOptions
from reap_driver.workflow.results import Result

NAME = "prune"
SUMMARY = "make a model smaller in one command: observe, plan, apply"
DESCRIPTION = """\
Runs the model once over your data, ranks its experts, and writes a new checkpoint without the
ones that matter least. Everything that could refuse the model, the data or the output is checked
before the weights are loaded. The output also holds the statistics and the plan it came from, in
DIR/reap.

With --shape, experts that stay lose neurons, too, and their down projections are solved again. The
Gram matrices that this needs are beside DIR, in DIR.prune-gram, until DIR is written; --dry-run
says how large they are.

Records are JSON lines, elements of JSON arrays, rows of Parquet, CSV or a hub data set, or text
files, of any common shape: `text`, `messages` (put through the model's chat template),
`instruction` and `output`, `question` and `answer`, `chosen`, `input_ids`, and more.
"""
EXAMPLES = """\
examples:
  reap-kernels prune MODEL --data code.jsonl --ratio 0.5 --out MODEL-half
  reap-kernels prune MODEL --data code.jsonl:1000 --data chat.parquet:500 \\
      --ratio 0.25 --out OUT
  reap-kernels prune MODEL --data notes/ --dtype bfloat16 --device cuda \\
      --ratio 0.4 --out OUT
  reap-kernels prune MODEL --data code.jsonl --protect super --criterion msan \\
      --out OUT
  reap-kernels prune MODEL --data code.jsonl --allocation global \\
      --non-uniform --out OUT
  reap-kernels prune MODEL --data code.jsonl --ratio 0.5 --refit --out OUT
  reap-kernels prune MODEL --data code.jsonl --fits 16GB --context 8192 \\
      --out OUT
  reap-kernels prune MODEL --data code.jsonl --shape auto --ratio 0.5 --out OUT
  reap-kernels prune MODEL --data notes/ --fits 16GB --dry-run
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Model, data, ranking, output."""
    add(parser, PruneOptions, DryRun, EstimateOptions)


def run(args: argparse.Namespace, console: Console) -> Result | None:
    """Prunes, or says what that would take."""
    if hasattr(args, "refit") and hasattr(args, "dry_run"):
        raise refused("`refit`: not with --dry-run; the command refit estimates that part")
    estimate = estimated(args, console, pruning=True)
    if estimate is not None:
        return estimate
    require(args, "out")
    options = read(PruneOptions, args)
    from reap_driver.workflow.prune import Pruned
    from reap_driver.workflow.prune_refit import prune
    from reap_driver.workflow.refit_results import Refitted

    found = prune(options, console)
    if isinstance(found, Pruned | Refitted):
        words = ["reap-kernels", "compare", str(options.model), str(found.out)]
        console.say(f"next: {shlex.join(words)} --data HELD-OUT")
    return found
