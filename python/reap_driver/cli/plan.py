"""`reap-kernels plan`: rank experts by their statistics and decide which go."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.cli import options, ranking
from reap_driver.cli.console import Console
from reap_driver.plan.criteria import known_criterion

if TYPE_CHECKING:
    from reap_driver.plan.plan import Plan
    from reap_kernels import SaliencyStats

NAME = "plan"
SUMMARY = "rank experts by their statistics and decide which go"
DESCRIPTION = """\
Ranks the experts of every layer by a criterion and decides which go. Writes a plan: a JSON file you
can read and edit. Takes no model, and no time.

Removed per layer = experts * ratio, rounded down. Where the router chooses among groups of experts,
each group loses as many. Statistics that were observed in parts (`observe --folds 8`) also say
which experts other data of the same kind might have decided otherwise.
"""
EXAMPLES = """\
examples:
  reap-kernels plan stats.safetensors --ratio 0.5 --out plan.json
  reap-kernels plan stats.safetensors --criterion frequency --ratio 0.25 --out plan.json
  reap-kernels plan stats.safetensors --criterion 'S(0.5,1,1)' --out plan.json
  reap-kernels plan stats.safetensors --criterion random:1 --out baseline.json
  reap-kernels plan stats.safetensors --weights code=0.7,tools=0.3 --out plan.json
  reap-kernels plan stats.safetensors --protect super --protect 3:17,40 --out plan.json
  reap-kernels plan stats.safetensors --allocation global --ratio 0.3 --out plan.json
  reap-kernels plan stats.safetensors --skip-first 1 --layer-ratios ratios.yaml --out plan.json
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
    ranking.check_ranking(args)
    from reap_driver.cli.outputs import check_file, inputs_of
    from reap_driver.plan.scoring import score
    from reap_kernels import SaliencyStats

    check_file(args.out, overwrite=args.overwrite, inputs=inputs_of(args, args.out))
    stats = SaliencyStats.load(args.stats)
    plan = ranking.planned(args, score(stats, args.criterion, args.weights), stats)
    plan.save(args.out)
    sure = certainty(plan, stats, console)
    for note in [*plan.notes, *advice(plan, stats.provenance["layers"])]:
        console.note(note)
    console.say(describe(plan))
    console.say(f"wrote {args.out}; next: reap-kernels apply MODEL {args.out} --out DIR")
    return {"out": str(args.out), **facts(plan), **sure}


def advice(plan: "Plan", layers: dict[str, dict[str, Any]]) -> list[str]:
    """Numbers of experts that engines are surer to serve, of a plan they can load at all."""
    from reap_driver.plan.allocation import explicit
    from reap_driver.plan.budget import served_advice

    if not plan.uniform:
        return []
    removed = {name: len(layer.removed) for name, layer in plan.layers.items()}
    guarded = plan.settings.get("protected")
    facts = {name: layers[name] for name in plan.layers}
    return served_advice(explicit(facts, removed, protected=guarded))


def certainty(plan: "Plan", stats: "SaliencyStats", console: Console) -> dict[str, Any]:
    """Which experts other data might have decided otherwise, for people and for machines.

    Returns:
        `margin` {layer: ids}; nothing where the statistics cannot tell.
    """
    found = known_criterion(plan.criterion)
    if not stats.parts or found is None or not found.is_sum:
        return {}
    from reap_driver.base.threads import single_threaded
    from reap_driver.plan.stability import CERTAIN, keep_probability, margin
    from reap_kernels.errors import DataError

    try:
        with single_threaded():
            inside = margin(keep_probability(stats, plan))
    except DataError as error:
        console.note(f"how sure the plan is cannot be told: {error}")
        return {}
    experts = sum(layer.num_experts for layer in plan.layers.values())
    console.note(
        f"{sum(map(len, inside.values()))} of {experts} experts, in {len(inside)} layers, are "
        f"inside the decision margin: other data of this kind would keep them with a probability "
        f"between {1 - CERTAIN:.1%} and {CERTAIN:.1%} (as {len(stats.parts)} parts of it differ)"
    )
    return {"margin": inside}


def facts(plan: "Plan") -> dict[str, Any]:
    """The plan in numbers, for machines."""
    return {
        "criterion": plan.criterion,
        "allocation": plan.allocation,
        "settings": plan.settings,
        "ratio": plan.ratio,
        "layers": len(plan.layers),
        "experts": sum(layer.num_experts for layer in plan.layers.values()),
        "removed": sum(len(layer.removed) for layer in plan.layers.values()),
        "kept_by_layer": {name: len(layer.kept) for name, layer in plan.layers.items()},
        "uniform": plan.uniform,
        "scores_digest": plan.scores_digest,
        "notes": plan.notes,
    }


def describe(plan: "Plan") -> str:
    """The plan in a line, for people."""
    layers = plan.layers.values()
    held = sum(len(ids) for ids in plan.settings.get("protected", {}).values())
    tail = f"; {held} of them protected" if held else ""
    if plan.uniform:
        counts = {(layer.num_experts, len(layer.kept)) for layer in layers}
        each = " and ".join(f"{kept} of {experts}" for experts, kept in sorted(counts))
        text = f"keeps {each} experts in each of {len(layers)} layers"
        return f"plan by {plan.criterion}: {text}{tail}"
    kept = [len(layer.kept) for layer in layers]
    experts = sum(layer.num_experts for layer in layers)
    return (
        f"plan by {plan.criterion}, {plan.allocation}: keeps {sum(kept)} of {experts} experts, "
        f"from {min(kept)} to {max(kept)} in each of {len(layers)} layers{tail}"
    )
