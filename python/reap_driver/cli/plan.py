"""`reap-kernels plan`: rank experts by their statistics and decide which go."""

import argparse

from reap_driver.cli.arguments import add, read, require
from reap_driver.workflow.console import Console
from reap_driver.workflow.jobs import PlanOptions
from reap_driver.workflow.results import Result

NAME = "plan"
SUMMARY = "rank experts by their statistics and decide which go"
DESCRIPTION = """\
Ranks the experts of every layer by a criterion and decides which go. Writes a plan: a JSON file you
can read and edit. Takes no weights, and no time, but with --shape.

With --shape, experts that stay lose neurons, too. Their new down projections need the weights of
the experts, which are read layer by layer, and the Gram matrices of `observe --gram`. They go into
PLAN.matrices beside PLAN.json, where `apply` and `compare` find them.

Removed per layer = experts * ratio, rounded down. Where the router chooses among groups of experts,
each group loses as many. Statistics that were observed in parts (`observe --folds 8`) also say
which experts other data of the same kind might have decided otherwise.
"""
EXAMPLES = """\
examples:
  reap-kernels plan stats.safetensors --ratio 0.5 --out plan.json
  reap-kernels plan stats.safetensors --fits 16GB --out plan.json
  reap-kernels plan stats.safetensors --criterion frequency --ratio 0.25 \\
      --out plan.json
  reap-kernels plan stats.safetensors --criterion 'S(0.5,1,1)' --out plan.json
  reap-kernels plan stats.safetensors --criterion random:1 --out baseline.json
  reap-kernels plan stats.safetensors --weights code=0.7,tools=0.3 \\
      --out plan.json
  reap-kernels plan stats.safetensors --protect super --protect 3:17,40 \\
      --out plan.json
  reap-kernels plan stats.safetensors --allocation global --ratio 0.3 \\
      --out plan.json
  reap-kernels plan stats.safetensors --skip-first 1 \\
      --layer-ratios ratios.yaml --out plan.json
  reap-kernels plan stats.safetensors --gram sums --shape auto --ratio 0.5 \\
      --out plan.json
  reap-kernels plan stats.safetensors --gram sums --shape 96x512 --out plan.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Statistics, ranking, output."""
    add(parser, PlanOptions)


def run(args: argparse.Namespace, console: Console) -> Result:
    """Ranks, decides, saves."""
    require(args, "out")
    options = read(PlanOptions, args)
    from reap_driver.workflow.plan import make

    found = make(options, console)
    console.say(f"wrote {found.out}; next: reap-kernels apply MODEL {found.out} --out DIR")
    return found
