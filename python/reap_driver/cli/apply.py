"""`reap-kernels apply`: write the checkpoint a plan leaves."""

import argparse

from reap_driver.cli.arguments import add, read
from reap_driver.workflow.console import Console
from reap_driver.workflow.jobs import ApplyOptions
from reap_driver.workflow.results import Result

NAME = "apply"
SUMMARY = "write the smaller checkpoint that a plan leaves of a model"
DESCRIPTION = """\
Writes a new checkpoint with the experts the plan keeps. Works on files, at the speed of the disk
and with little memory, whatever the size or the quantization of the model. The source is never
touched; the output appears under its name when it is complete and verified. It also holds the
plan, in DIR/reap.

A plan that leaves experts fewer neurons (`plan --shape`) is written with its new down projections,
from PLAN.matrices beside PLAN.json or --matrices. These are stored in the format of the model's
weights, so quantized models are refused.

A plan may keep different numbers of experts in different layers. transformers' own from_pretrained,
vLLM and SGLang read one number for all layers and refuse such a checkpoint, so it is only written
with --non-uniform: for reap-kernels, and for the load_pruned.py it then holds, which needs
transformers alone. --as-masks writes the plan as masks for the original's routers instead.

With --refit the checkpoint goes to DIR.cut first, and is then re-fitted on --data, for which both
it and MODEL are run. The better of the two, as it is or re-fitted, goes to DIR.
"""
EXAMPLES = """\
examples:
  reap-kernels apply MODEL plan.json --out MODEL-half
  reap-kernels apply MODEL plan.json --out MODEL-half --shard-size 5GB
  reap-kernels apply MODEL plan.json --refit --data code.jsonl --out MODEL-half
  reap-kernels apply MODEL budgets.json --non-uniform --out MODEL-half
  reap-kernels apply MODEL budgets.json --as-masks masks.safetensors
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Model, plan, output."""
    add(parser, ApplyOptions)


def run(args: argparse.Namespace, console: Console) -> Result | None:
    """Writes the checkpoint, or the masks."""
    options = read(ApplyOptions, args)
    from reap_driver.workflow.apply import apply

    return apply(options, console)
