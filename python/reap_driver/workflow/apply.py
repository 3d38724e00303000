"""Applying: writes the checkpoint that a plan leaves of a model, re-fitted if that is asked for, or
the plan as masks.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reap_driver.base.units import in_bytes, took
from reap_driver.observation.data_parallel import ranks
from reap_driver.planning.plan import Plan
from reap_driver.workflow.complete import Complete
from reap_driver.workflow.jobs import ApplyOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.options import WriteOptions
from reap_driver.workflow.outputs import check_file, check_replaced_folder, inputs_of
from reap_driver.workflow.plan import matrices_beside, plan_of
from reap_driver.workflow.refit_behind import cut_beside, with_refit
from reap_driver.workflow.refit_results import Refitted
from reap_driver.workflow.results import Result
from reap_driver.writer.apply import apply_plan
from reap_driver.writer.mask_file import save_masks
from reap_driver.writer.plan_matrices import matrices_of
from reap_driver.writer.report import ApplyReport
from reap_driver.writer.staging import check_replaceable
from reap_kernels.errors import CheckpointError


@dataclass(frozen=True, repr=False)
class Applied(Result):
    """A checkpoint that was written.

    Attributes:
        out: its folder.
        report: what was done to what.
        refitted: the re-fit of what is left; None without one. `report` is then of a folder that is
            gone.

    Example:
        >>> rd.apply("MODEL", plan, out="cut").report.experts_after
        24
    """

    out: Path
    report: ApplyReport
    refitted: Refitted | None = None

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        refitted = {} if self.refitted is None else {"refitted": self.refitted.facts()}
        return {"out": str(self.out), **report_facts(self.report), **refitted}

    def describe(self) -> str:
        """See `Result`."""
        written = report_lines(self.report)
        return written if self.refitted is None else f"{written}\n{self.refitted.describe()}"


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


def apply(
    options: ApplyOptions, listener: Listener | None = None
) -> Applied | Masked | Complete | None:
    """Writes the checkpoint; see `reap_driver.apply`."""
    heard = Collector(listener)
    plan = plan_of(options.plan)
    if isinstance(options.as_masks, Path):
        return _write_masks(options, plan, options.as_masks, heard)
    assert isinstance(options.out, Path)  # as options that were checked have it
    if options.refit:
        return _write_and_refit(options, plan, options.out, heard)
    return _write(options, plan, options.out, heard)


def _write(options: ApplyOptions, plan: Plan, out: Path, heard: Collector) -> Applied:
    """Writes the checkpoint as the plan leaves it."""
    matrices = matrices_of(plan, options.matrices, matrices_beside(options.plan))
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
                options.write, overwrite=options.overwrite, trust=options.run.trust_remote_code
            ),
        )
    for note in [*report.plan.notes[len(plan.notes) :], *report.warnings]:
        heard.note(note)
    found = Applied(heard.notes, out, report)
    heard.say(found.describe())
    return found


def _write_and_refit(
    options: ApplyOptions, plan: Plan, out: Path, heard: Collector
) -> Applied | Complete | None:
    """The same, and its re-fit. A run that goes on writes the cut again, the same bits, which takes
    a small part of the time of a re-fit.

    Raises:
        CheckpointError: the output is there and may not be replaced, or would replace an input; or
            there is nothing to go on from.
    """
    resume, place = options.resume, cut_beside(out)

    def write(place: Path) -> Applied | None:
        if world.rank > 0:
            return None
        overwrite = options.overwrite or bool(resume)
        return _write(replace(options, out=place, overwrite=overwrite), plan, place, heard)

    with ranks() as world:
        heard.only(world.rank == 0)
        check_replaced_folder(out, inputs_of(options, out))
        if resume != "auto":  # then it may be the output of this command
            check_replaceable(out, overwrite=options.overwrite)
        if resume is True and not place.is_dir():
            raise CheckpointError(
                f"{place}: is not there, where an interrupted run leaves the cut; run without "
                "`resume=True`"
            )
        applied, refitted = with_refit(options, out, write, world, heard, resume=bool(resume))
        if applied is not None and isinstance(refitted, Refitted):
            return replace(applied, notes=heard.notes, out=out, refitted=refitted)
        return refitted if isinstance(refitted, Complete) else None


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
        trust_remote_code=options.run.trust_remote_code,
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
        "mtp_tensors": report.mtp_tensors,
        "mtp_layers": {
            name: {"experts": [layer.before, len(layer.kept)], "kept_like": layer.like}
            for name, layer in report.mtp_layers.items()
        },
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
    if report.mtp_tensors:
        counts = {f"{len(la.kept)} of {la.before}" for la in report.mtp_layers.values()}
        experts = f", {' or '.join(sorted(counts))} experts in each" if counts else ""
        lines.append(f"kept multi-token-prediction layers: {report.mtp_tensors} tensors{experts}")
    if report.left_out:
        lines.append(
            f"left out other weight formats and hidden files: {', '.join(report.left_out)}"
        )
    return "\n".join(lines)
