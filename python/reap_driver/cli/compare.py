"""`reap-kernels compare`: how closely a pruned model follows its original."""

import argparse

from reap_driver.cli.arguments import add, read
from reap_driver.workflow.console import Console
from reap_driver.workflow.follow_up_jobs import CompareOptions
from reap_driver.workflow.results import Result

NAME = "compare"
SUMMARY = "show how closely pruned models follow their original"
DESCRIPTION = """\
Runs the models on the same text and compares their predictions of every next token: perplexity of
both, KL divergence, expected acceptance (the share of the pruned model's tokens that speculative
sampling by the original would accept, 1 for equal models) and how often the most likely token is
the same; for each group of the data and overall, with 95 % intervals from a bootstrap over
sequences. Use text the experts were not chosen by.

PRUNED may be a plan: the original's routers are then masked, and no checkpoint is needed. Where
the models do not fit in memory they are streamed, one decoder layer at a time; no logits are kept
but those of the batch in hand.

Several PRUNED give one table with a row for each. The original runs once for all of them, and the
differences from the first one have intervals of their own: sequence by sequence, both models read
the same text, so that differences are surer than the figures they are of.

Where the plan is known (PRUNED is one, or holds reap/plan.json) the original's routing is followed
too: orphans are tokens whose first expert the plan removes.
"""
EXAMPLES = """\
examples:
  reap-kernels compare MODEL MODEL-half --data held-out.jsonl
  reap-kernels compare MODEL plan.json --data code=src.parquet \\
      --data chat.jsonl --tokens 200k
  reap-kernels compare MODEL half.json quarter.json --data held-out.jsonl
  reap-kernels compare MODEL MODEL-half --data held-out.jsonl \\
      --tasks gsm8k,ifeval --limit 200
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Models, data, limits, tasks."""
    add(parser, CompareOptions)


def run(args: argparse.Namespace, console: Console) -> Result:
    """Compares."""
    if len(args.pruned) == 1:
        [args.pruned] = args.pruned
    options = read(CompareOptions, args)
    from reap_driver.workflow.compare import compare

    return compare(options, console)
