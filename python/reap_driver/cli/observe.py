"""`reap-kernels observe`: run the model on calibration data and save statistics of its experts."""

import argparse
from pathlib import Path
from typing import Any

from reap_driver.cli import dry_run, options
from reap_driver.cli.console import Console

NAME = "observe"
SUMMARY = "run a model on calibration data, save statistics of its experts"
DESCRIPTION = """\
Runs the model once over your data and saves, for every expert, how often it was used and how much
it contributed. The slow step, and the only one that loads the weights: plans made from the
statistics later cost seconds, whatever criterion, ratio or weights of groups you try.

Records are JSON lines, Parquet rows, text files or rows of a hub data set, of any common shape:
`text`, `messages` (put through the model's chat template), `instruction` and `output`, `input_ids`,
and more. Documents are packed end to end into sequences of --seq-len tokens, where nothing is
padded and nothing is cut off; --packing has other ways.

Statistics are kept by group, and for --folds shares of the sequences beside the whole: what `plan`
and `report` say of how sure a choice is comes from them.
"""
EXAMPLES = """\
examples:
  reap-kernels observe MODEL --data code.jsonl --out stats.safetensors
  reap-kernels observe MODEL --data code=src.parquet:700 --data tools=calls.jsonl:330 \\
      --seq-len 2048 --out stats.safetensors
  reap-kernels observe MODEL --recipe mix.yaml --packing none --max-len 16384 --answers-only \\
      --out stats.safetensors
  reap-kernels observe config.json --dry-run --tokens 24M
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Model, data, output."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to save the statistics")
    options.add_overwrite(parser)
    options.add_trust(parser)
    options.add_calibration(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    """Observes and saves; what can be checked early is."""
    options.check_calibration(args)
    if args.dry_run:
        return dry_run.run(args, console)
    from reap_driver.cli import calibrate, running
    from reap_driver.cli.outputs import check_file, inputs_of
    from reap_driver.observation.data_parallel import ranks

    with ranks() as world:
        console.speaks(first=world.rank == 0)
        wanted = calibrate.sources_of(args)
        check_file(args.out, overwrite=args.overwrite, inputs=inputs_of(args, args.out))
        running.check_journal(args, world)
        model = calibrate.inspect_model(args)
        seq_len = calibrate.check_options(args, model.config)
        calibrate.check_packing(args, model.meta.config, model.layers)
        model.check_files()
        sources = calibrate.read_data(args, wanted, model.config, seq_len, console)
        with running.observed(args, model, sources, console, world) as found:
            if found is None:
                return None
            found.stats.save(args.out)
        facts, text = calibrate.summary(found.stats, found.seconds)
        console.say(text)
        next_step = f"reap-kernels plan {args.out} --ratio 0.5 --out plan.json"
        console.say(f"wrote {args.out}; next: {next_step}")
        return {"out": str(args.out), **facts}
