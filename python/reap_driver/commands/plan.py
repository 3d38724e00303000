"""`reap-kernels plan`: rank experts by their statistics and decide which go."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.commands import options, ranking
from reap_driver.commands.console import Console

if TYPE_CHECKING:
    from reap_driver.plan import Plan

NAME = "plan"
SUMMARY = "rank experts by their statistics and decide which go"
DESCRIPTION = """\
Ranks the experts of every layer by a criterion and decides which go. Writes a plan: a JSON file you
can read and edit. Takes no model, and no time.

Removed per layer = experts * ratio, rounded down. Where the router chooses among groups of experts,
each group loses as many.
"""
EXAMPLES = """\
examples:
  reap-kernels plan stats.safetensors --ratio 0.5 --out plan.json
  reap-kernels plan stats.safetensors --criterion frequency --ratio 0.25 --out plan.json
  reap-kernels plan stats.safetensors --weights code=0.7,tools=0.3 --out plan.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Statistics, ranking, output."""
    parser.add_argument("stats", type=Path, metavar="STATS", help="file that `observe` wrote")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where to save the plan"
    )
    options.add_overwrite(parser)
    ranking.add_ranking(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Scores, decides, saves."""
    from reap_driver.allocate import served_advice, uniform
    from reap_driver.commands.outputs import check_file
    from reap_driver.criteria import score
    from reap_driver.planning import make_plan
    from reap_kernels import SaliencyStats

    check_file(args.out, overwrite=args.overwrite)
    stats = SaliencyStats.load(args.stats)
    scores = score(stats, args.criterion, args.weights)
    plan = make_plan(scores, args.ratio)
    plan.save(args.out)
    for note in [*plan.notes, *served_advice(uniform(scores.layers, args.ratio))]:
        console.note(note)
    console.say(describe(plan))
    console.say(f"wrote {args.out}; next: reap-kernels apply MODEL {args.out} --out DIR")
    return {"out": str(args.out), **facts(plan)}


def facts(plan: "Plan") -> dict[str, Any]:
    """The plan in numbers, for machines."""
    return {
        "criterion": plan.criterion,
        "allocation": plan.allocation,
        "ratio": plan.ratio,
        "layers": len(plan.layers),
        "experts": sum(layer.num_experts for layer in plan.layers.values()),
        "removed": sum(len(layer.removed) for layer in plan.layers.values()),
        "scores_digest": plan.scores_digest,
        "notes": plan.notes,
    }


def describe(plan: "Plan") -> str:
    """The plan in a line, for people."""
    counts = {(layer.num_experts, len(layer.kept)) for layer in plan.layers.values()}
    each = " and ".join(f"{kept} of {experts}" for experts, kept in sorted(counts))
    return f"plan by {plan.criterion}: keeps {each} experts in each of {len(plan.layers)} layers"
