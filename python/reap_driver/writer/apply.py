"""Writes a pruned checkpoint from a checkpoint's files and a plan."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.base.mtp import MtpChoice
from reap_driver.compat import load_pruned
from reap_driver.compat.config_edit import differences
from reap_driver.compat.load_pruned import SETTINGS
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.checkpoint import RECORD, Checkpoint, open_checkpoint, resolve_folder
from reap_driver.files.quantization import Quantization, quantization_of
from reap_driver.model.discover import find_moe_layers, record_of
from reap_driver.model.stacks import Stack
from reap_driver.planning.plan import Plan
from reap_driver.planning.serving import served_advice
from reap_driver.writer.actions import Compute, Drop, Relabel
from reap_driver.writer.card import inherited_fields, model_card
from reap_driver.writer.expert_names import ExpertNames, numbered_experts, other_modules
from reap_driver.writer.json_files import copied_names, renamed_metadata, rewritten_files
from reap_driver.writer.keys import KeyActions, KeyDecider
from reap_driver.writer.mtp import MtpKeys
from reap_driver.writer.mtp_config import with_mtp
from reap_driver.writer.narrowing import (
    Computed,
    Narrowed,
    compute,
    narrow,
    notes_on,
    unchanged,
)
from reap_driver.writer.plan_checks import (
    check_counts,
    check_kept,
    check_layers,
    check_model,
    loader_warning,
    no_such_layer,
)
from reap_driver.writer.plan_matrices import Given, matrices_of
from reap_driver.writer.pruned_model import (
    Checked,
    PrunedModel,
    check_output,
    check_source,
    derive_model,
    stacks_of_files,
)
from reap_driver.writer.report import ApplyReport, Specification, specify
from reap_driver.writer.shards import OutShard, plan_shards, write_index
from reap_driver.writer.small_files import copy_file, counter
from reap_driver.writer.staging import check_target, clean_stale, publish, rehearse, staged
from reap_driver.writer.stream import check_threads, write_computed, write_shards
from reap_kernels import SaliencyStats

LOADER = "load_pruned.py"  # of checkpoints whose layers keep different numbers of experts


@typed
def apply_plan(
    model_path: str | Path,
    plan: "Plan",
    out_path: str | Path,
    *,
    mtp: MtpChoice = "drop",
    shard_size: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    non_uniform: bool = False,
    force_model: bool = False,
    stats: "SaliencyStats | None" = None,
    matrices: "Given" = None,
) -> ApplyReport:
    """Writes the pruned checkpoint from the files of the original one, in constant memory.

    The output appears under its name only when it is complete, flushed to disk and verified; it
    holds the plan as `reap/plan.json`. The source is never changed. Kept tensors have the bytes of
    the source, whatever their format. Experts that the plan changes keep the source's names, layout
    and dtype; a plan that leaves them fewer neurons sets their width in config.json.

    Args:
        model_path: folder of a Hugging Face checkpoint in safetensors, or a hub id.
        plan: which experts each layer keeps. Layers that it does not name keep all. Unless
            `non_uniform`, layers whose experts one field of the configuration counts must keep
            equally many.
        out_path: folder to create.
        mtp: "drop" leaves multi-token-prediction layers out and clears the fields that announce
            them; "prune" leaves their experts those of the plan's entry for them, or else those
            that the last MoE layer keeps; "keep" leaves them all their experts, which is refused
            where engines count these by the field of the other layers. Those without experts are
            copied by both.
        shard_size: bytes of tensor data per file; None keeps the division of the source.
        overwrite: replace a checkpoint at `out_path`, once the new one is complete.
        trust_remote_code: run model code that comes with the checkpoint.
        threads: number of files written at once; None: at most 4. The output does not depend on it,
            but for the time that the card states.
        progress: called with (bytes written, bytes to write) in the calling thread. An exception
            that it raises ends the run.
        non_uniform: layers may keep different numbers of experts. Such a checkpoint is loaded by
            this package and by the `load_pruned.py` that is written beside its weights, and refused
            by transformers' own `from_pretrained`, vLLM and SGLang.
        force_model: apply the plan even if it was made for a model with other routing or sizes, as
            far as it can be written. The model card and the report's plan note the differences.
        stats: the statistics that the plan was made from, to be saved in the folder `reap` too.
        matrices: new down projections of the experts that stay, {layer: [E', H, I']} (expert,
            output, input) or the folder that was written with the plan; needed by plans with
            neurons, and by no plan of whole experts.

    Returns:
        What was written.

    Raises:
        PlanError: the plan is for another model or cannot be applied to it, its matrices are
            missing or not its own, or `mtp`, `shard_size` or `threads` has another value than
            above.
        CheckpointError: the source is damaged or inconsistent, or the output cannot be written.
        UnsupportedModel: the model cannot be pruned correctly from its files, or experts are to
            change that are quantized or have no width of their own.
        ResourceError: the disk is full.

    Example:
        >>> report = rd.apply_plan("MODEL", plan, "applied")
        >>> report.experts_before, report.experts_after
        (32, 24)
    """
    started = time.perf_counter()
    check_threads(threads)  # before the model is read or downloaded
    out = Path(out_path).absolute()
    folder = resolve_folder(model_path)
    cleaned = clean_stale(out)
    check_target(out, folder, overwrite=overwrite)
    options = _Options(mtp, shard_size, trust_remote_code, non_uniform, force_model)
    found = matrices_of(plan, matrices)
    job = _prepare(open_checkpoint(folder), plan, options, found)
    checked = job.check()
    model_card(job.inherited, job.plan, _report(job, out, 0))  # so that its errors come first
    needed = job.bytes_needed()
    with staged(out, needed=needed) as staging:
        report = _write(job, checked, staging, out, counter(progress, needed), threads, started)
        report.bytes_written += _save_record(staging, job.plan, stats)
        job.source.fingerprints.check()
        left = publish(staging, out, overwrite=overwrite)
    if job.card_note is not None:
        report.warnings.append(job.card_note)
    if left is not None:
        report.warnings.append(
            f"the checkpoint that was replaced cannot be removed; it is in {left}: remove it"
        )
    report.cleaned = [str(path) for path in cleaned]
    report.seconds = time.perf_counter() - started
    return report


@typed
def check_plan(
    model_path: str | Path,
    plan: "Plan",
    out_path: str | Path,
    *,
    mtp: MtpChoice = "drop",
    shard_size: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    threads: int | None = None,
    non_uniform: bool = False,
    force_model: bool = False,
) -> None:
    """Raises what `apply_plan` with these arguments would raise before it writes its first byte.

    The result is the same for all plans that remove equally many experts, and leave them equally
    many neurons, so it can be checked before a long observation that its plan can be written.
    Matrices are not asked for.
    """
    check_threads(threads)  # before the model is read or downloaded
    out = Path(out_path).absolute()
    folder = resolve_folder(model_path)
    clean_stale(out)
    check_target(out, folder, overwrite=overwrite)
    options = _Options(mtp, shard_size, trust_remote_code, non_uniform, force_model)
    job = _prepare(open_checkpoint(folder), plan, options, None)
    job.check()
    rehearse(out, needed=job.bytes_needed())


@dataclass(frozen=True)
class OutputSize:
    """Size of a checkpoint that was not written yet.

    Attributes:
        weights: bytes of its weight files.
        total: bytes of all files but the card, the index and the record.
        mtp: bytes of multi-token-prediction layers before and after, which `weights` counts.
    """

    weights: int
    total: int
    mtp: tuple[int, int] = (0, 0)


def output_size(
    source: Checkpoint,
    plan: "Plan",
    *,
    mtp: MtpChoice,
    shard_size: int | None,
    trust_remote_code: bool,
    non_uniform: bool,
    force_model: bool,
) -> OutputSize:
    """What `apply_plan` with these arguments would write of a checkpoint, by its headers.

    That every tensor has the shape that the configuration gives it is not checked.

    Raises:
        PlanError, CheckpointError, UnsupportedModel: see `apply_plan`.
    """
    options = _Options(mtp, shard_size, trust_remote_code, non_uniform, force_model)
    job = _prepare(source, plan, options, None)
    return OutputSize(job.weight_bytes(), job.bytes_needed(), job.mtp_bytes())


@dataclass(frozen=True)
class _Options:
    """Arguments of `apply_plan`."""

    mtp: MtpChoice
    shard_size: int | None
    trust: bool
    non_uniform: bool
    force_model: bool


@dataclass(frozen=True)
class _Job:
    """Everything decided before the first byte is written."""

    plan: "Plan"  # with notes on how the model differs from the plan's
    source: Checkpoint
    model: PrunedModel
    keys: KeyActions
    narrowed: Narrowed
    computed: Computed  # tensors with new values
    quantization: Quantization
    shards: list[OutShard]
    stacks: Sequence[Stack]
    counts: Mapping[str, tuple[int, int]]  # experts of every layer, before and after
    json_files: Mapping[str, dict[str, Any]]  # rewritten: config.json and quantisers' files
    specification: Specification
    loader: str | None  # content of load_pruned.py, where layers keep different numbers
    served: list[str]  # why an engine refuses the number of experts
    inherited: Mapping[str, Any] | None  # fields of the source's card; None: cannot be read
    card_note: str | None  # why they cannot be read

    def check(self) -> Checked:
        """Compares every tensor of the source with the configuration; see `check_source`."""
        where = str(self.source.folder / "config.json")
        return check_source(self.source.tensors, self.model.old, where, self.quantization)

    def weight_bytes(self) -> int:
        """Size of the weight files."""
        return sum(shard.nbytes + len(shard.header()) for shard in self.shards)

    def mtp_bytes(self) -> tuple[int, int]:
        """Bytes of multi-token-prediction layers, before and after."""
        sources = {self.source.tensors[key] for key in self.keys.mtp_keys}
        written = (tensor for shard in self.shards for tensor in shard.tensors)
        after = sum(tensor.nbytes for tensor in written if tensor.source in sources)
        return sum(entry.nbytes for entry in sources), after

    def bytes_needed(self) -> int:
        """Size of the output: weight files, and what is copied beside them."""
        small = sum((self.source.folder / path).stat().st_size for path in self.source.small_files)
        return self.weight_bytes() + small + len(self.loader or "")


def _prepare(
    source: Checkpoint,
    plan: "Plan",
    options: _Options,
    matrices: Mapping[str, Tensor] | None,
) -> _Job:
    """Decides everything, and checks all but the shapes of tensors; writes nothing.

    Without matrices, their names are taken from the plan; then nothing can be written.
    """
    folder = source.folder
    source.check_copied()
    inherited = inherited_fields(source)
    check_kept(plan)
    full = meta_model(load_config(folder, trust_remote_code=options.trust))
    layers = find_moe_layers(full)
    extra = check_layers(plan, layers)
    record = record_of(full, layers)
    notes = check_model(plan, record, folder, force=options.force_model)
    experts = {la.name: la.num_experts for la in layers}
    whole = plan.covering(experts)
    kept = whole.kept
    counts = {name: (number, len(kept[name])) for name, number in experts.items()}
    trust = {"trust_remote_code": options.trust}
    stacks = stacks_of_files(folder, full, source.config, experts, **trust)
    check_counts(plan, stacks, counts, non_uniform=options.non_uniform, mtp=options.mtp)
    model = derive_model(folder, full, source.config, stacks, counts, **trust)
    mtp = MtpKeys(model.layout, model.old.shapes, whole.layers, options.mtp)
    _check_extra_layers(extra, mtp)
    quantization = quantization_of(source)
    decider = KeyDecider(source.tensors, model.old, model.new, model.layout, kept, quantization)
    keys = decider.decide(mtp)
    config, mtp_notes = with_mtp(model.raw_config, options.mtp, keys.mtp, stacks, counts, folder)
    model = replace(model, raw_config=config)
    narrowed, computed = unchanged(model, keys)
    if plan.compensates or matrices:
        narrowed = narrow(folder, full, model, whole, stacks, layers, trust=options.trust)
        values = _unknown(plan) if matrices is None else matrices
        computed = compute(source, layers, narrowed, whole, keys, values, quantization)
    model = narrowed.model
    names = ExpertNames(numbered_experts(keys, model.layout, plan.kept), other_modules(keys))
    files = rewritten_files(source, model.raw_config, names, counts)
    rename = partial(renamed_metadata, names=names)
    shards = plan_shards(source, computed.actions, options.shard_size, rename)
    left = {name: after for name, (_, after) in counts.items()}
    entries = source.tensors.values()
    spec = specify(full, layers, left, model.new.shapes, entries, source.config)
    loader = _loader(model.raw_config)
    plan = plan.noting([*notes, *mtp_notes, *notes_on(narrowed)])
    served = served_advice(plan, record["layers"])
    decided = (quantization, shards, stacks, counts, files, spec, loader, served)
    return _Job(plan, source, model, keys, narrowed, computed, *decided, *inherited)


def _unknown(plan: "Plan") -> dict[str, Tensor]:
    """In place of the matrices of a plan, where they are not asked for."""
    changed = (name for name, layer in plan.layers.items() if layer.neurons is not None)
    return dict.fromkeys(changed, torch.empty(0, device="meta"))


def _write(
    job: _Job,
    checked: Checked,
    staging: Path,
    out: Path,
    progress: Callable[[int], None],
    threads: int | None,
    started: float,
) -> ApplyReport:
    """Writes everything into the temporary folder, then verifies it."""
    written = write_shards(staging, job.shards, progress, threads)
    written += write_index(staging, job.shards, job.source.index_metadata)
    for path in job.source.small_files:
        if path.as_posix() not in (*job.json_files, LOADER):
            written += copy_file(job.source, path, staging, progress)
    for name, content in job.json_files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        written += (staging / name).write_text(text, encoding="utf-8")
    if job.loader is not None:
        written += (staging / LOADER).write_text(job.loader, encoding="utf-8")
    write_computed(staging, job.shards, job.computed, progress)
    tensors = [tensor for shard in job.shards for tensor in shard.tensors]
    check_output(tensors, job.model.new, checked, _renamed(job.keys))
    report = _report(job, out, written)
    report.seconds = time.perf_counter() - started  # so far, for the card
    card = model_card(job.inherited, job.plan, report)
    report.bytes_written += (staging / "README.md").write_text(card, encoding="utf-8")
    return report


def _save_record(staging: Path, plan: "Plan", stats: "SaliencyStats | None") -> int:
    """Saves the plan, and the statistics, in the checkpoint; returns their size in bytes."""
    folder = staging / RECORD
    folder.mkdir()
    plan.save(folder / "plan.json")
    if stats is not None:
        stats.save(folder / "stats.safetensors")
    return sum(path.stat().st_size for path in folder.iterdir())


def _report(job: _Job, out: Path, written: int) -> ApplyReport:
    """The report, without what is known only after writing."""
    parts = [{name: job.counts[name] for name in stack.layers} for stack in job.stacks]
    widths = job.narrowed.widths
    cut = [
        part
        for part in parts
        if any(before != after or name in widths for name, (before, after) in part.items())
    ] or parts
    before, after = zip(*(pair for part in cut for pair in part.values()), strict=True)
    uniform = job.loader is None
    warnings = [*job.served, *([] if uniform else [loader_warning(after)])]
    warnings += copied_names(job.source, job.json_files)
    return ApplyReport(
        plan=job.plan,
        source=job.source.folder,
        out_path=out,
        layers=len(after),
        experts_before=max(before),
        experts_after=max(after),
        experts_per_layer=job.counts,
        neurons_per_layer=widths,
        refitted=list(job.computed.layers),
        tensors_computed=sum(isinstance(a, Compute) for a in job.computed.actions.values()),
        whole=[name for part in parts if part not in cut for name in part],
        uniform=uniform,
        tensors=sum(len(shard.tensors) for shard in job.shards),
        tensor_bytes=sum(shard.nbytes for shard in job.shards),
        source_tensors=len(job.source.tensors),
        source_tensor_bytes=job.source.nbytes,
        bytes_written=written,
        shards=len(job.shards),
        specification=job.specification,
        edited_config=differences(job.source.config, job.json_files["config.json"]),
        expert_keys_dropped=len(job.keys.dropped("expert")),
        tables_rewritten=sum(isinstance(a, Relabel) for a in job.keys.actions.values()),
        mtp_dropped=job.keys.dropped("mtp"),
        mtp_tensors=len(job.keys.mtp_written),
        mtp_layers=job.keys.mtp,
        left_out=[path.as_posix() for path in job.source.left_out],
        licenses=[
            path.as_posix()
            for path in job.source.small_files
            if path.name.lower().startswith("licen")  # in either spelling
        ],
        warnings=warnings,
    )


def _loader(config: Mapping[str, Any]) -> str | None:
    """The source of the module that loads a checkpoint whose layers differ; None if none does."""
    if SETTINGS not in config:
        return None
    return Path(load_pruned.__file__).read_text(encoding="utf-8")


def _check_extra_layers(names: tuple[str, ...], mtp: MtpKeys) -> None:
    """Checks that layers of the plan that the main model lacks are MTP layers."""
    for name in names:
        if not mtp.owns(name, name + "."):
            raise no_such_layer(name)


def _renamed(keys: KeyActions) -> dict[str, str]:
    """Old name -> new name of every tensor that is kept."""
    return {key: a.name for key, a in keys.actions.items() if not isinstance(a, Drop)}
