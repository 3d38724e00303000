"""`reap-kernels search`: find how many experts each layer should lose, by trying plans."""

import argparse
import fractions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.cli import options, ranking
from reap_driver.cli.console import Console

if TYPE_CHECKING:
    from reap_driver.budget_search.search import Found

NAME = "search"
SUMMARY = "find how many experts each layer should lose"
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
"""
EXAMPLES = """\
examples:
  reap-kernels search MODEL stats.safetensors --data held.jsonl --ratio 0.5 --out plan.json
  reap-kernels search MODEL stats.safetensors --data held.jsonl:200 --evaluations 1000 \\
      --out plan.json
  reap-kernels search MODEL stats.safetensors --data held.jsonl --out plan.json --resume
"""

_MOST_FOLDS = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Model, statistics, ranking, data, search, output."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument("stats", type=Path, metavar="STATS", help="file that `observe` wrote")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where to save the plan"
    )
    options.add_overwrite(parser)
    options.add_trust(parser)
    options.add_force_model(parser)
    ranking.add_ranking(parser, searched=True)
    group = parser.add_argument_group("search", "--seed is of the search, too.")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--evaluations",
        type=options.positive,
        default=500,
        metavar="N",
        help="plans to try (default: %(default)s)",
    )
    length.add_argument(
        "--generations", type=options.positive, metavar="N", help="the same, in generations"
    )
    group.add_argument(
        "--population",
        type=options.positive,
        default=32,
        metavar="N",
        help="plans in a generation (default: %(default)s)",
    )
    group.add_argument(
        "--elites",
        type=options.positive,
        default=4,
        metavar="N",
        help="the best of them, from which the next ones are made (default: %(default)s)",
    )
    group.add_argument(
        "--validation",
        type=share,
        default="0.5",
        metavar="SHARE",
        help="share of the sequences that are held out from the search (default: %(default)s); 0 "
        "for none",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on where an interrupted search stopped, whose state is in OUT.search; the outcome "
        "has the bits of one that was never interrupted",
    )
    options.add_data(parser)
    options.add_running(parser)
    parser.set_defaults(journal=False)  # its state is no journal of batches


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Searches and saves; what can be checked early is."""
    _check(args)
    from reap_driver.cli import searching
    from reap_driver.cli.outputs import check_file, inputs_of
    from reap_driver.cli.plan import describe, facts

    check_file(args.out, overwrite=args.overwrite, inputs=inputs_of(args, args.out))
    with searching.searched(args, console) as (found, costs):
        found.plan.save(args.out)
    for note in found.plan.notes:
        console.note(note)
    console.say(describe(found.plan))
    uneven = "" if found.plan.uniform else " --non-uniform"
    console.say(f"wrote {args.out}; next: reap-kernels apply MODEL {args.out}{uneven} --out DIR")
    return {"out": str(args.out), **facts(found.plan), **_outcome(found), **costs}


def _check(args: argparse.Namespace) -> None:
    """Ends with a usage error where arguments are missing, or contradict each other."""
    options.check_data(args)
    ranking.check_ranking(args)
    if not args.data and not args.recipe:
        args.refuse("the following arguments are required: --data or --recipe")
    if args.stream == "always":
        args.refuse("argument --stream: a search needs the whole model in memory; leave it out")
    if args.device_map is not None and args.device != "auto":
        args.refuse("argument --device-map: not together with --device")
    if args.elites >= args.population:
        args.refuse(f"argument --elites: fewer than the population of {args.population}")


def _outcome(found: "Found") -> dict[str, Any]:
    """What the plan is worth, for machines."""
    check = found.check
    return {
        "evaluations": len(found.evaluated),
        "acceptance": {"searched": found.fitness, "uniform": found.uniform},
        "held_out": None
        if check is None
        else {
            "sequences": check.sequences,
            "predictions": check.predictions,
            "searched": check.searched,
            "uniform": check.uniform,
            "difference_low": check.low,
            "difference_high": check.high,
        },
    }


def share(text: str) -> fractions.Fraction:
    """A number from 0 to below 1, as the nearest fraction with a small denominator."""
    try:
        found = fractions.Fraction(float(text)).limit_denominator(_MOST_FOLDS)
    except (ValueError, OverflowError):  # no number, NaN, infinity
        found = fractions.Fraction(-1)
    if not 0 <= found < 1 or (found == 0 and float(text) != 0):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not 0 or a share from {1 / _MOST_FOLDS} to {1 - 1 / _MOST_FOLDS}"
        )
    return found
