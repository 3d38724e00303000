"""`reap-kernels search`: find how many experts and neurons should go, by trying plans."""

import argparse

from reap_driver.cli.arguments import add, read, require
from reap_driver.workflow.console import Console
from reap_driver.workflow.jobs import SearchOptions
from reap_driver.workflow.results import Result

NAME = "search"
SUMMARY = "find how many experts or neurons should go, by trying plans"
DESCRIPTION = """\
Layers bear the loss of experts unequally. This tries hundreds of plans that remove as many experts
as the uniform one, but more from some layers and fewer from others, and keeps the one that follows
the full model most closely on your text: an evolutionary search (EvoESAP). Within a layer the
experts with the lowest scores go, as in `plan`.

The model must fit in memory, with its logits for the text beside it; no checkpoint is written. A
part of the text is held out, and tells in the end whether the plan is better than the uniform one
on text it was not searched on. Use other text than STATS was observed on, and not much of it: the
model runs on all of it for every plan, and ten thousand tokens tell plans apart.

The plan keeps different numbers of experts in different layers; `apply --help` says what loads such
a checkpoint.

With --shape auto it searches for the shape of all layers instead: how many experts, and how many
neurons of each. It tries the cut of whole experts and up to seven shapes of the same size, each
with its down projections solved again from the Gram matrices that `observe --gram` sums, and keeps
the best. The plan is the same for all layers, so every engine loads the checkpoint.
"""
EXAMPLES = """\
examples:
  reap-kernels search MODEL stats.safetensors --data held.jsonl --ratio 0.5 \\
      --out plan.json
  reap-kernels search MODEL stats.safetensors --data held.jsonl:200 \\
      --evaluations 1000 --out plan.json
  reap-kernels search MODEL stats.safetensors --data held.jsonl \\
      --out plan.json --resume
  reap-kernels search MODEL stats.safetensors --shape auto --gram sums \\
      --data held.jsonl --ratio 0.5 --out plan.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Model, statistics, ranking, data, search, output."""
    add(parser, SearchOptions)


def run(args: argparse.Namespace, console: Console) -> Result:
    """Searches and saves."""
    require(args, "out")
    options = read(SearchOptions, args)
    from reap_driver.workflow.search import Searched, search

    found = search(options, console)
    if isinstance(found, Searched):
        uneven = "" if found.plan.uniform else " --non-uniform"
        next_step = f"reap-kernels apply MODEL {found.out}{uneven} --out DIR"
        console.say(f"wrote {found.out}; next: {next_step}")
    return found
