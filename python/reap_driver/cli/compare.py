"""`reap-kernels compare`: how closely a pruned model follows its original."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.cli import options
from reap_driver.cli.console import Console

if TYPE_CHECKING:  # they import torch, and --help must not
    from reap_driver.cli.comparing import Compared, Pair
    from reap_driver.evaluation.figures import Estimate, Figures
    from reap_driver.plan.plan import Plan

NAME = "compare"
SUMMARY = "show how closely a pruned model follows its original"
DESCRIPTION = """\
Runs both models on the same text and compares their predictions of every next token: perplexity of
both, KL divergence, expected acceptance (the share of the pruned model's tokens that speculative
sampling by the original would accept, 1 for equal models) and how often the most likely token is
the same; for each group of the data and overall, with 95 % intervals from a bootstrap over
sequences. Use text the experts were not chosen by.

PRUNED may be a plan: the original's routers are then masked, and no checkpoint is needed. Where
both models do not fit in memory they are streamed, one decoder layer at a time; no logits are kept
but those of the batch in hand.

Where the plan is known (PRUNED is one, or holds reap/plan.json) the original's routing is followed
too: orphans are tokens whose first expert the plan removes.
"""
EXAMPLES = """\
examples:
  reap-kernels compare MODEL MODEL-half --data held-out.jsonl
  reap-kernels compare MODEL plan.json --data code=src.parquet --data chat.jsonl --tokens 200k
  reap-kernels compare MODEL MODEL-half --data held-out.jsonl --tasks gsm8k,ifeval --limit 200
"""
# Name in tables, attribute of `Figures`, digits.
_ROWS = (
    ("perplexity, original", "original_perplexity", 4),
    ("perplexity, pruned", "pruned_perplexity", 4),
    ("perplexity, ratio", "perplexity_ratio", 4),
    ("KL divergence (nats)", "kl", 3),
    ("expected acceptance", "acceptance", 4),
    ("same top token", "same_top", 4),
)
# Of both checkpoints, spread evenly: enough to find experts that were written in another order.
_CHECKED_LAYERS = 4


def configure(parser: argparse.ArgumentParser) -> None:
    """Models, data, limits, tasks."""
    parser.add_argument("model", metavar="ORIGINAL", help="checkpoint folder or hub id")
    parser.add_argument(
        "pruned", metavar="PRUNED", help="checkpoint folder or hub id; or a plan, as a file"
    )
    options.add_trust(parser)
    options.add_force_model(parser)
    group = options.add_data(parser)
    limit = group.add_mutually_exclusive_group()
    limit.add_argument(
        "--tokens",
        type=options.count,
        metavar="N",
        help="of every source without a budget of its own, a random sample of N tokens",
    )
    limit.add_argument(
        "--sequences", type=options.positive, metavar="N", help="the same, N sequences"
    )
    options.add_running(parser)
    _add_tasks(parser)
    parser.add_argument(
        "--draws",
        type=options.positive,
        default=2000,
        metavar="N",
        help="of the bootstrap that intervals come from (default: %(default)s)",
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "tasks", "Both models are handed to lm-evaluation-harness (extra `eval`)."
    )
    group.add_argument(
        "--tasks",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        metavar="A,B",
        help="names of its tasks",
    )
    group.add_argument(
        "--task-folder", type=Path, metavar="DIR", help="where more tasks are, as its .yaml files"
    )
    group.add_argument(
        "--chat-template", action="store_true", help="put questions through the chat template"
    )
    group.add_argument(
        "--limit", type=options.positive, metavar="N", help="questions of each task (default: all)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Checks, compares, and says what was found."""
    options.check_data(args)
    if not args.data and not args.recipe and not args.tasks:
        args.refuse("the following arguments are required: --data, --recipe or --tasks")
    from reap_driver.cli import comparing
    from reap_driver.evaluation import tasks
    from reap_driver.evaluation.comparison_file import FORMAT

    if args.tasks:
        tasks.check_installed()
    pair = comparing.pair_of(args, console)
    found: dict[str, Any] = {"original": args.model, "pruned": args.pruned}
    if args.data or args.recipe:
        sources = comparing.read_data(args, pair, console)
        outcome = comparing.compared(args, pair, sources, console)
        found = {"format": FORMAT.name, "version": FORMAT.version, **found, **facts(outcome)}
        found["data"] = [source.provenance() for source in sources]
        console.say(describe(outcome))
        integrity = _integrity(args, pair, outcome, console)
        if integrity:
            found["integrity"] = integrity
            console.say(_integrity_lines(integrity))
    if args.tasks:
        original, pruned = comparing.evaluated(args, pair, console)
        found["tasks"] = {"original": original, "pruned": pruned}
        console.say(tasks.table(original, pruned))
    return found


def facts(outcome: "Compared") -> dict[str, Any]:
    """The figures, for machines."""
    comparison = outcome.comparison
    return {
        "confidence": 0.95,
        "draws": comparison.draws,
        "overall": _facts(comparison.overall),
        "groups": {name: _facts(figures) for name, figures in comparison.by_group.items()},
    }


def _facts(figures: "Figures") -> dict[str, Any]:
    found: dict[str, Any] = {"sequences": figures.sequences, "predictions": figures.predictions}
    for _, name, _ in _ROWS:
        estimate: Estimate = getattr(figures, name)
        found[name] = {key: _number(value) for key, value in vars(estimate).items()}
    return found


def _number(value: float | None) -> float | None:
    """JSON has no infinities."""
    return value if value is None or math.isfinite(value) else None


def describe(outcome: "Compared") -> str:
    """The figures as a table, a block for each group and one for all."""
    comparison = outcome.comparison
    groups = comparison.by_group
    blocks = dict(groups) if len(groups) > 1 else {}
    blocks["all" if blocks else next(iter(groups))] = comparison.overall
    lines = []
    for title, figures in blocks.items():
        lines.append(
            f"{title}: {figures.predictions:,} predictions in {figures.sequences:,} sequences"
        )
        for name, attribute, digits in _ROWS:
            lines.append(f"  {name:<22}{_shown(getattr(figures, attribute), digits)}")
    return "\n".join(lines)


def _shown(estimate: "Estimate", digits: int) -> str:
    """A figure with its interval."""
    text = f"{estimate.value:#.{digits}g}"
    if estimate.low is None:
        return f"{text:>9}  no interval: a group has one sequence"
    return f"{text:>9}  [{estimate.low:#.{digits}g}, {estimate.high:#.{digits}g}]"


def _integrity(
    args: argparse.Namespace, pair: "Pair", outcome: "Compared", console: Console
) -> dict[str, Any]:
    """What the plan does to the original's routing, where that is known, over all layers."""
    found: dict[str, Any] = {}
    if outcome.orphans:
        layers = list(outcome.orphans.values())
        tokens = sum(layer.tokens for layer in layers)
        found |= {
            "orphan_rate": sum(layer.orphaned for layer in layers) / max(1, tokens),
            "stranded_rate": sum(layer.stranded for layer in layers) / max(1, tokens),
            "retained_gate_share": sum(la.router_weight_share * la.tokens for la in layers)
            / max(1, tokens),
            "orphans_by_layer": {name: la.rate for name, la in outcome.orphans.items()},
        }
    if pair.pruned is None or pair.plan is None:
        return found
    stats = pair.pruned.source.folder / "reap" / "stats.safetensors"
    found |= _calibration(stats, pair.plan, console)
    from reap_driver.compat.decoder_layers import decoder_layers
    from reap_driver.evaluation.audit import check_permutation

    names = [layer.name for layer in pair.original.layers]
    checked = min(_CHECKED_LAYERS, len(decoder_layers(pair.original.meta, names)))
    problems = check_permutation(
        pair.original.path,
        pair.pruned.path,
        pair.plan,
        sample=checked,
        trust_remote_code=args.trust_remote_code,
    )
    return {**found, "layers_checked": checked, "misplaced": problems}


def _calibration(path: Path, plan: "Plan", console: Console) -> dict[str, Any]:
    """What the kept experts did on the data that chose them, where the statistics are there."""
    from reap_driver.evaluation.routing import retained
    from reap_kernels import SaliencyStats
    from reap_kernels.errors import DataError, PlanError
    from reap_kernels.files import is_file

    if not is_file(path):
        return {}
    try:
        shares = list(retained(SaliencyStats.load(path), plan).values())
    except (DataError, PlanError) as error:  # no reason to lose what was measured
        console.note(f"what kept experts did on the calibration data is not known: {error}")
        return {}
    return {
        "calibration_gate_share": sum(layer.router_weight_share for layer in shares) / len(shares),
        "calibration_saliency_share": sum(layer.saliency_share for layer in shares) / len(shares),
        "dead_kept": sum(len(layer.dead_kept) for layer in shares),
        "dead_removed": sum(len(layer.dead_removed) for layer in shares),
    }


def _integrity_lines(found: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = ["what was pruned"]
    if "orphan_rate" in found:
        rates = found["orphans_by_layer"]
        worst = max(rates, key=rates.__getitem__)
        lines += [
            f"  orphans               {found['orphan_rate']:.1%} of tokens lose their first expert"
            f" (most in {worst}: {rates[worst]:.1%})",
            f"  stranded              {found['stranded_rate']:.2%} of tokens lose all of them",
            f"  retained routing      {found['retained_gate_share']:.1%} of a token's gate weights",
        ]
    if "dead_kept" in found:
        lines.append(
            f"  calibration           kept {found['calibration_gate_share']:.1%} of gate weights, "
            f"{found['calibration_saliency_share']:.1%} of saliency; {found['dead_kept']} of the "
            f"kept experts and {found['dead_removed']} of the removed were never routed to"
        )
    if "misplaced" in found:
        wrong = found["misplaced"]
        said = f"{len(wrong)} PROBLEMS, first: {wrong[0]}" if wrong else "all in the plan's order"
        lines.append(
            f"  experts and routers   {said} ({found['layers_checked']} decoder layers checked)"
        )
    return "\n".join(lines)
