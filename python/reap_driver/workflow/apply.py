"""Applying: writes the checkpoint that a plan leaves of a model, or the plan as masks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.base.units import in_bytes, took
from reap_driver.planning.plan import Plan
from reap_driver.workflow.jobs import ApplyOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.options import WriteOptions
from reap_driver.workflow.outputs import check_file, check_replaced_folder, inputs_of
from reap_driver.workflow.plan import matrices_beside, plan_of
from reap_driver.workflow.results import Result
from reap_driver.writer.apply import apply_plan
from reap_driver.writer.mask_file import save_masks
from reap_driver.writer.plan_matrices import matrices_of
from reap_driver.writer.report import ApplyReport


@dataclass(frozen=True, repr=False)
class Applied(Result):
    """A checkpoint that was written.

    Attributes:
        out: its folder.
        report: what was done to what.

    Example:
        >>> rd.apply("MODEL", plan, out="cut").report.experts_after
        24
    """

    out: Path
    report: ApplyReport

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        return {"out": str(self.out), **report_facts(self.report)}

    def describe(self) -> str:
        """See `Result`."""
        return report_lines(self.report)


@dataclass(frozen=True, repr=False)
class Masked(Result):
    """A plan that was written as masks.

    Attributes:
        masks: the file.
        plan: the plan, noted how it fits the model.

    Example:
        >>> rd.apply("MODEL", plan, as_masks="masks.safetensors").facts()["kept"]
        96
    """

    masks: Path
    plan: Plan

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        layers = self.plan.layers
        kept = sum(len(layer.kept) for layer in layers.values())
        return {"masks": str(self.masks), "layers": len(layers), "kept": kept}

    def describe(self) -> str:
        """See `Result`."""
        facts = self.facts()
        experts = sum(layer.num_experts for layer in self.plan.layers.values())
        return (
            f"wrote {self.masks}: {facts['kept']} of {experts} experts may be routed to, in "
            f"{facts['layers']} layers\n  reap_driver.masked_experts applies them"
        )


def apply(options: ApplyOptions, listener: Listener | None = None) -> Applied | Masked:
    """Writes the checkpoint; see `reap_driver.apply`."""
    heard = Collector(listener)
    plan = plan_of(options.plan)
    if isinstance(options.as_masks, Path):
        return _write_masks(options, plan, options.as_masks, heard)
    matrices = matrices_of(plan, options.matrices, matrices_beside(options.plan))
    out = options.out
    assert isinstance(out, Path)  # as options that were checked have it
    check_replaced_folder(out, inputs_of(options, out))
    with heard.progress("writing", "B") as progress:
        report = apply_plan(
            str(options.model),
            plan,
            out,
            progress=progress.reach,
            force_model=options.force_model,
            matrices=matrices,
            **writer_arguments(
                options.write, overwrite=options.overwrite, trust=options.trust_remote_code
            ),
        )
    for note in [*report.plan.notes[len(plan.notes) :], *report.warnings]:
        heard.note(note)
    found = Applied(heard.notes, out, report)
    heard.say(found.describe())
    return found


def writer_arguments(write: WriteOptions, *, overwrite: bool, trust: bool) -> dict[str, Any]:
    """Arguments of the writer."""
    return {
        "mtp": write.mtp,
        "shard_size": write.shard_bytes,
        "overwrite": overwrite,
        "trust_remote_code": trust,
        "non_uniform": write.non_uniform,
    }


def _write_masks(options: ApplyOptions, plan: Plan, path: Path, heard: Collector) -> Masked:
    """Writes the plan as masks."""
    check_file(path, overwrite=options.overwrite, inputs=inputs_of(options, path))
    applied = save_masks(
        str(options.model),
        plan,
        path,
        trust_remote_code=options.trust_remote_code,
        force_model=options.force_model,
    )
    for note in applied.notes[len(plan.notes) :]:
        heard.note(note)
    found = Masked(heard.notes, path, applied)
    heard.say(found.describe())
    return found


def report_facts(report: ApplyReport) -> dict[str, Any]:
    """A report of the writer in numbers, for machines."""
    return {
        "layers": report.layers,
        "experts_before": report.experts_before,
        "experts_after": report.experts_after,
        "experts_per_layer": {name: list(pair) for name, pair in report.experts_per_layer.items()},
        "neurons_per_layer": {name: list(pair) for name, pair in report.neurons_per_layer.items()},
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


def report_lines(report: ApplyReport) -> str:
    """A report of the writer in a few lines, for people."""
    fewest = min(after for _, after in report.pruned.values())
    equal = fewest == report.experts_after
    kept = str(fewest) if equal else f"{fewest} to {report.experts_after}"
    widths = sorted({f"{after} of {before}" for before, after in report.neurons_per_layer.values()})
    narrow = f", {' or '.join(widths)} neurons in each expert" if widths else ""
    lines = [
        f"wrote {report.out_path} in {took(report.seconds)}",
        f"  {kept} of {report.experts_before} experts in each of {report.layers} layers{narrow}, "
        f"{in_bytes(report.tensor_bytes)} of {in_bytes(report.source_tensor_bytes)}",
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
