"""`reap-kernels observe`: run the model on calibration data and save statistics of its experts."""

import argparse

from reap_driver.cli.arguments import add, read, require
from reap_driver.cli.dry_run import PRUNING, DryRun, estimated
from reap_driver.workflow.console import Console
from reap_driver.workflow.jobs import EstimateOptions, ObserveOptions
from reap_driver.workflow.results import Result

NAME = "observe"
SUMMARY = "run a model on calibration data, save statistics of its experts"
DESCRIPTION = """\
Runs the model once over your data and saves, for every expert, how often it was used and how much
it contributed. The slow step, and the only one that loads the weights: plans made from the
statistics later cost seconds, whatever criterion, ratio or weights of groups you try.

Records are JSON lines, elements of JSON arrays, rows of Parquet, CSV or a hub data set, or text
files, of any common shape: `text`, `messages` (put through the model's chat template),
`instruction` and `output`, `question` and `answer`, `chosen`, `input_ids`, and more. Documents are
packed end to end into sequences of --seq-len tokens, where nothing is padded and nothing is cut
off; --packing has other ways.

Statistics are kept by group, and for --folds shares of the sequences beside the whole: what `plan`
and `report` say of how sure a choice is comes from them.
"""
EXAMPLES = """\
examples:
  reap-kernels observe MODEL --data code.jsonl --out stats.safetensors
  reap-kernels observe MODEL --data code=src.parquet:700 \\
      --data tools=calls.jsonl:330 --seq-len 2048 --out stats.safetensors
  reap-kernels observe MODEL --recipe mix.yaml --packing none --max-len 16384 \\
      --answers-only --out stats.safetensors
  reap-kernels observe config.json --dry-run --tokens 24M
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Model, data, output."""
    add(parser, ObserveOptions, DryRun, EstimateOptions, without=PRUNING)


def run(args: argparse.Namespace, console: Console) -> Result | None:
    """Observes, or says what that would take."""
    estimate = estimated(args, console)
    if estimate is not None:
        return estimate
    require(args, "out")
    options = read(ObserveOptions, args)
    from reap_driver.workflow.observe import Observed, observe_data

    found = observe_data(options, console)
    if isinstance(found, Observed):
        also = "" if found.gram is None else f" and {found.gram}"
        shape = "" if found.gram is None else f" --shape auto --gram {found.gram}"
        next_step = f"reap-kernels plan {found.out}{shape} --ratio 0.5 --out plan.json"
        console.say(f"wrote {found.out}{also}; next: {next_step}")
    return found
