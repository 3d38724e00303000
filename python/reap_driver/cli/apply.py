"""`reap-kernels apply`: write the checkpoint a plan leaves."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap_driver.base.units import short
from reap_driver.cli import options
from reap_driver.cli.console import Console

if TYPE_CHECKING:
    from reap_driver.plan.plan import Plan
    from reap_driver.writer.report import ApplyReport

NAME = "apply"
SUMMARY = "write the smaller checkpoint that a plan leaves of a model"
DESCRIPTION = """\
Writes a new checkpoint with the experts the plan keeps. Works on files, at the speed of the disk
and with little memory, whatever the size or the quantization of the model. The source is never
touched; the output appears under its name when it is complete and verified. It also holds the
plan, in DIR/reap.

A plan may keep different numbers of experts in different layers. transformers' own from_pretrained,
vLLM and SGLang read one number for all layers and refuse such a checkpoint, so it is only written
with --non-uniform: for reap-kernels, and for the load_pruned.py it then holds, which needs
transformers alone. --as-masks writes the plan as masks for the original's routers instead.
"""
EXAMPLES = """\
examples:
  reap-kernels apply MODEL plan.json --out MODEL-half
  reap-kernels apply MODEL plan.json --out MODEL-half --shard-size 5GB
  reap-kernels apply MODEL budgets.json --non-uniform --out MODEL-half
  reap-kernels apply MODEL budgets.json --as-masks masks.safetensors
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Model, plan, output."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument("plan", type=Path, metavar="PLAN", help="file that `plan` wrote")
    result = parser.add_mutually_exclusive_group(required=True)
    result.add_argument("--out", type=Path, metavar="DIR", help="folder of the new checkpoint")
    result.add_argument(
        "--as-masks",
        type=Path,
        metavar="FILE",
        help="write no checkpoint but a safetensors file of one bool tensor [E] a layer: the "
        "experts its router may choose",
    )
    options.add_overwrite(parser)
    options.add_trust(parser)
    options.add_force_model(parser)
    options.add_writing(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Writes the checkpoint."""
    from reap_driver.cli.outputs import check_replaced_folder, inputs_of
    from reap_driver.plan.plan import Plan
    from reap_driver.writer.apply import apply_plan

    plan = Plan.load(args.plan)
    if args.as_masks is not None:
        return _write_masks(args, plan, console)
    check_replaced_folder(args.out, inputs_of(args, args.out))
    with console.progress("writing", "B") as progress:
        report = apply_plan(
            args.model,
            plan,
            args.out,
            mtp=args.mtp,
            shard_size=args.shard_size,
            overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code,
            progress=progress.reach,
            non_uniform=args.non_uniform,
            force_model=args.force_model,
        )
    for note in [*report.plan.notes[len(plan.notes) :], *report.warnings]:
        console.note(note)
    console.say(describe(report))
    return {"out": str(args.out), **facts(report)}


def _write_masks(args: argparse.Namespace, plan: "Plan", console: Console) -> dict[str, Any]:
    """Writes the plan as masks."""
    from reap_driver.cli.outputs import check_file, inputs_of
    from reap_driver.writer.mask_file import save_masks

    check_file(args.as_masks, overwrite=args.overwrite, inputs=inputs_of(args, args.as_masks))
    applied = save_masks(
        args.model,
        plan,
        args.as_masks,
        trust_remote_code=args.trust_remote_code,
        force_model=args.force_model,
    )
    for note in applied.notes[len(plan.notes) :]:
        console.note(note)
    experts = sum(layer.num_experts for layer in plan.layers.values())
    kept = sum(len(layer.kept) for layer in plan.layers.values())
    console.say(
        f"wrote {args.as_masks}: {kept} of {experts} experts may be routed to, in "
        f"{len(plan.layers)} layers; reap_driver.masked_experts applies them"
    )
    return {"masks": str(args.as_masks), "layers": len(plan.layers), "kept": kept}


def facts(report: "ApplyReport") -> dict[str, Any]:
    """The report in numbers, for machines."""
    return {
        "layers": report.layers,
        "experts_before": report.experts_before,
        "experts_after": report.experts_after,
        "experts_per_layer": {name: list(pair) for name, pair in report.experts_per_layer.items()},
        "whole": report.whole,
        "tensor_bytes_before": report.source_tensor_bytes,
        "tensor_bytes_after": report.tensor_bytes,
        "bytes_written": report.bytes_written,
        "shards": report.shards,
        "edited_config": dict(report.edited_config),
        "mtp_dropped": len(report.mtp_dropped),
        "left_out": report.left_out,
        "warnings": report.warnings,
        "apply_seconds": round(report.seconds, 3),
    }


def describe(report: "ApplyReport") -> str:
    """The report in a few lines, for people."""
    fewest = min(after for _, after in report.pruned.values())
    equal = fewest == report.experts_after
    kept = str(fewest) if equal else f"{fewest} to {report.experts_after}"
    lines = [
        f"wrote {report.out_path} in {report.seconds:.1f} s: {kept} of "
        f"{report.experts_before} experts in each of {report.layers} layers, "
        f"{short(report.tensor_bytes)}B of {short(report.source_tensor_bytes)}B"
    ]
    if report.whole:
        lines.append(f"left whole: {len(report.whole)} MoE layers of another part of the model")
    if report.mtp_dropped:
        lines.append(f"left out {len(report.mtp_dropped)} tensors of multi-token-prediction layers")
    if report.left_out:
        lines.append(
            f"left out other weight formats and hidden files: {', '.join(report.left_out)}"
        )
    return "\n".join(lines)
