"""`reap-kernels prune`: observe, plan and apply in one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.cli import apply, dry_run, options, plan, ranking
from reap_driver.cli.console import Console

if TYPE_CHECKING:  # they import torch, and --help must not
    from reap_driver.cli.calibrate import Model
    from reap_driver.cli.running import Observed

NAME = "prune"
SUMMARY = "make a model smaller in one command: observe, plan, apply"
DESCRIPTION = """\
Runs the model once over your data, ranks its experts, and writes a new checkpoint without the
ones that matter least. Everything that could refuse the model, the data or the output is checked
before the weights are loaded. The output also holds the statistics and the plan it came from, in
DIR/reap.

Records are JSON lines, Parquet rows, text files or rows of a hub data set, of any common shape:
`text`, `messages` (put through the model's chat template), `instruction` and `output`, `input_ids`,
and more.
"""
EXAMPLES = """\
examples:
  reap-kernels prune MODEL --data code.jsonl --ratio 0.5 --out MODEL-half
  reap-kernels prune MODEL --data code.jsonl:1000 --data chat.parquet:500 --ratio 0.25 --out OUT
  reap-kernels prune MODEL --data notes/ --dtype bfloat16 --device cuda --ratio 0.4 --out OUT
  reap-kernels prune MODEL --data code.jsonl --protect super --criterion msan --out OUT
  reap-kernels prune MODEL --data code.jsonl --allocation global --non-uniform --out OUT
  reap-kernels prune MODEL --data notes/ --dry-run
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Model, data, ranking, output."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the new checkpoint")
    parser.add_argument(
        "--stats",
        type=Path,
        metavar="FILE",
        help="save the statistics here too, as soon as there are any: for long runs",
    )
    options.add_overwrite(parser)
    options.add_trust(parser)
    ranking.add_ranking(parser)
    options.add_calibration(parser)
    options.add_writing(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    """Checks, observes, plans, writes."""
    options.check_calibration(args)
    ranking.check_ranking(args)
    if args.dry_run:
        return dry_run.run(args, console)
    from reap_driver.cli import calibrate, running
    from reap_driver.cli.outputs import check_file, check_replaced_folder, inputs_of
    from reap_driver.observation.data_parallel import ranks

    with ranks() as world:
        console.speaks(first=world.rank == 0)
        wanted = calibrate.sources_of(args)
        inputs = inputs_of(args, args.out, args.stats)
        if args.stats is not None:
            check_file(args.stats, overwrite=args.overwrite, inputs=inputs)
            inputs.append(args.stats)  # it stays
        check_replaced_folder(args.out, inputs)
        running.check_journal(args, world)
        model = calibrate.inspect_model(args)
        model.check_files()
        if world.rank == 0:  # the one that writes
            _check_writing(args, model, console)
        world.barrier()
        calibrate.check_groups(wanted, args.weights)
        seq_len = calibrate.check_options(args, model.config)
        calibrate.check_packing(args, model.meta.config, model.layers)
        sources = calibrate.read_data(args, wanted, model.config, seq_len, console)
        with running.observed(args, model, sources, console, world) as found:
            return None if found is None else _write(args, model, found, console)


def _writing(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the writer."""
    return {
        "mtp": args.mtp,
        "shard_size": args.shard_size,
        "overwrite": args.overwrite,
        "trust_remote_code": args.trust_remote_code,
        "non_uniform": args.non_uniform,
    }


def _check_writing(args: argparse.Namespace, model: "Model", console: Console) -> None:
    """Checks early that what will be planned can be written."""
    from reap_driver.writer.apply import check_plan

    # Plans that remove as many of each layer need the same space and pass the same checks.
    plans = ranking.foreseen(args, model.blank_scores())
    for blank in plans:
        check_plan(args.model, blank, args.out, **_writing(args))
    for advice in plan.advice(plans[0], model.provenance["layers"]):
        console.note(advice)


def _write(
    args: argparse.Namespace, model: "Model", found: "Observed", console: Console
) -> dict[str, Any]:
    """Ranks, plans, and writes the checkpoint."""
    from reap_driver.cli import calibrate
    from reap_driver.plan.scoring import score
    from reap_driver.writer.apply import apply_plan

    stats = found.stats
    observed, text = calibrate.summary(stats, found.seconds)
    console.say(text)
    if args.stats is not None:
        stats.save(args.stats)
    chosen = ranking.planned(args, score(stats, args.criterion, args.weights), stats)
    sure = plan.certainty(chosen, stats, console)
    for note in chosen.notes:
        console.note(note)
    console.say(plan.describe(chosen))

    model.check_unchanged()  # the plan is of the files that were observed
    with console.progress("writing", "B") as progress:
        report = apply_plan(
            args.model,
            chosen,
            args.out,
            progress=progress.reach,
            stats=stats,
            **_writing(args),
        )
    for warning in report.warnings:
        console.note(warning)
    console.say(apply.describe(report))
    planned = {**plan.facts(chosen), **sure}
    return {"out": str(args.out), **observed, **planned, **apply.facts(report)}
