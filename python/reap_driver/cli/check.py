"""`reap-kernels check`: whether an engine would serve what a plan leaves, or a checkpoint."""

import argparse

from reap_driver.cli.arguments import add, read
from reap_driver.workflow.console import Console
from reap_driver.workflow.exchange_jobs import CheckOptions
from reap_driver.workflow.results import Result

NAME = "check"
SUMMARY = "tell whether vLLM or SGLang would serve what a plan leaves"
DESCRIPTION = """\
Compares what a plan leaves, or a checkpoint, with what the engine is known to take: equal numbers
of experts in all layers, numbers that its router has kernels for, routing groups, experts that are
shared out among GPUs, and widths that are divided among them, in whole blocks where weights are
quantized. Takes no weights and no engine.

Ends with exit code 3 where the engine would refuse the model, and says what to do. Nothing known
is no proof: the engine itself is the judge.
"""
EXAMPLES = """\
examples:
  reap-kernels check plan.json --serve vllm --tp 2
  reap-kernels check plan.json --model MODEL-FP8 --serve sglang --tp 8 --ep 4
  reap-kernels check MODEL-half --serve vllm --tp 2 --ep 8
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Plan or model, engine."""
    add(parser, CheckOptions)


def run(args: argparse.Namespace, console: Console) -> Result:
    """Looks, compares, and ends with an error where the engine would refuse."""
    options = read(CheckOptions, args)
    from reap_driver.workflow.check import check

    found = check(options, console)
    found.require()
    console.say(found.describe())
    return found
