"""`reap-kernels convert`: statistics and plans from and to files of other tools."""

import argparse

from reap_driver.cli.arguments import add, read, require
from reap_driver.workflow.console import Console
from reap_driver.workflow.exchange_jobs import ConvertOptions
from reap_driver.workflow.results import Result

NAME = "convert"
SUMMARY = "convert statistics and plans from and to files of other tools"
DESCRIPTION = """\
Reads statistics, a plan or a file of another tool, and writes one. Takes no weights; a file of
another tool needs the configuration of its model, by --model.

What a file does not record stays unknown: criteria that need it refuse.
"""
EXAMPLES = """\
examples:
  reap-kernels convert observations_1024_cosine.pt --model MODEL --to stats \\
      --out imported.safetensors
  reap-kernels convert stats.safetensors --to reap-reference \\
      --out observations.pt
  reap-kernels convert plan.json --to riy --out profile.json
  reap-kernels convert profile.json --model MODEL --to plan --out imported.json
  reap-kernels convert stats.safetensors --to vllm-ascend-list \\
      --criterion reap --out experts.jsonl
  reap-kernels convert stats.safetensors --plan plan.json --model MODEL \\
      --to sglang --out location.json
  reap-kernels convert stats.safetensors --plan plan.json --to auto-round \\
      --bits 3 --out layer_config.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Source, formats, output."""
    add(parser, ConvertOptions)


def run(args: argparse.Namespace, console: Console) -> Result:
    """Reads, writes."""
    require(args, "out")
    options = read(ConvertOptions, args)
    from reap_driver.workflow.convert import convert

    return convert(options, console)
