"""Writes a checkpoint again with other down projections of its experts; all else stays."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from reap_driver.base.arguments import typed
from reap_driver.compat.conversion import KeyMap
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.checkpoint import (
    RECORD,
    Checkpoint,
    belongs,
    open_checkpoint,
    resolve_folder,
)
from reap_driver.files.quantization import quantization_of
from reap_driver.model.discover import MoELayer, find_moe_layers
from reap_driver.model.expert_parts import NewExperts
from reap_driver.writer.actions import Action, Compute, Copy
from reap_driver.writer.markdown import template
from reap_driver.writer.new_experts import ExpertValues, Side, refuse_quantized
from reap_driver.writer.pruned_model import Checked, check_output, check_source
from reap_driver.writer.shards import OutShard, plan_shards, write_index
from reap_driver.writer.small_files import copy_file, counter
from reap_driver.writer.staging import check_target, clean_stale, publish, staged
from reap_driver.writer.stream import check_threads, write_computed, write_shards
from reap_kernels.errors import PlanError
from reap_kernels.files import is_file

RECORD_FILE = "refit.json"  # in the folder `reap` of the output
_CARD = "README.md"


@dataclass
class ReplaceReport:
    """Result of writing a checkpoint with other down projections; see `replace_matrices`.

    Attributes:
        source, out_path: folders.
        layers: MoE layers whose down projections are new.
        tensors, tensor_bytes: of those written anew, on disk.
        bytes_written: size of all files.
        cleaned: folders of killed runs that were removed.
        warnings: sentences for the user.
        seconds: the call took.

    Example:
        >>> name = rd.find_moe_layers(model)[0].name
        >>> down = {name: 0.5 * model.get_submodule(name).down_proj}
        >>> report = rd.replace_matrices("MODEL", down, "refitted", record={"factor": 0.5})
        >>> report.layers, report.tensors  # one tensor per expert on disk
        (1, 32)
    """

    source: Path
    out_path: Path
    layers: int
    tensors: int
    tensor_bytes: int
    bytes_written: int
    cleaned: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


@typed
def replace_matrices(
    model_path: str | Path,
    matrices: Mapping[str, Tensor],
    out_path: str | Path,
    *,
    record: Mapping[str, Any],
    facts: Sequence[tuple[str, str]] = (),
    figures: Sequence[Sequence[str]] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ReplaceReport:
    """Writes a checkpoint again with other down projections of its experts.

    All other tensors have the bytes of the source, and all tensors its names, layout and dtype; a
    value that is given in another dtype is rounded once. The output appears under its name only
    when it is complete, flushed to disk and verified. Memory holds the matrices of one layer.

    Args:
        model_path: folder of a Hugging Face checkpoint in safetensors, or a hub id.
        matrices: name of an experts module -> its new down projections, [E, H, I] (expert, output,
            input) whatever the model's own layout; read once each. Layers that are not named keep
            theirs.
        out_path: folder to create.
        record: how the matrices were made, as JSON values; saved as `reap/refit.json`. What else
            the source has in `reap/` is copied.
        facts: rows (what, value) of a table in the model card, under the heading row.
        figures: rows of a second table, the heading row first: what was measured.
        overwrite: replace a checkpoint at `out_path`, once the new one is complete.
        trust_remote_code: run model code that comes with the checkpoint.
        threads: number of files copied at once; None: at most 4.
        progress: called with (bytes written, bytes to write). An exception that it raises ends the
            run.

    Raises:
        PlanError: `matrices` names no layer or one that the model does not have, or has values of
            another shape or that are not finite.
        CheckpointError: the source is damaged or inconsistent, or the output cannot be written.
        UnsupportedModel: the source is quantized, or stores its experts in a way that cannot be
            written anew.
        ResourceError: the disk is full.

    Example:
        >>> name = rd.find_moe_layers(model)[0].name
        >>> down = {name: 0.5 * model.get_submodule(name).down_proj}
        >>> rd.replace_matrices("MODEL", down, "halved", record={"factor": 0.5}).layers
        1
    """
    if not matrices:
        raise PlanError(
            "matrices: none are given for layers; give new down projections by the names of this "
            "model's experts modules."
        )
    return rewrite(
        model_path,
        matrices,
        out_path,
        record=record,
        facts=facts,
        figures=figures,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        threads=threads,
        progress=progress,
    )


def rewrite(
    model_path: str | Path,
    matrices: Mapping[str, Tensor],
    out_path: str | Path,
    *,
    record: Mapping[str, Any],
    facts: Sequence[tuple[str, str]] = (),
    figures: Sequence[Sequence[str]] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ReplaceReport:
    """`replace_matrices`, which without any matrices copies the checkpoint; its card then says that
    what was solved followed the original less closely.
    """
    started = time.perf_counter()
    check_threads(threads)
    out = Path(out_path).absolute()
    folder = resolve_folder(model_path)
    cleaned = clean_stale(out)
    check_target(out, folder, overwrite=overwrite)
    job = _prepare(open_checkpoint(folder), matrices, trust=trust_remote_code)
    section = template("reap_driver.writer", "refit.md.jinja").render(
        layers=len(matrices),
        facts=[("setting", "value"), *facts] if facts else [],
        figures=figures,
    )
    extra = _extra_files(job.source, record, section)
    needed = job.bytes_needed() + sum(map(len, extra.values()))
    with staged(out, needed=needed) as staging:
        written = _write(job, staging, extra, threads, counter(progress, needed))
        left = publish(staging, out, overwrite=overwrite)
    new = [t for shard in job.shards for t in shard.tensors if isinstance(t.action, Compute)]
    report = ReplaceReport(
        source=folder,
        out_path=out,
        layers=len(matrices),
        tensors=len(new),
        tensor_bytes=sum(tensor.nbytes for tensor in new),
        bytes_written=written,
        cleaned=[str(path) for path in cleaned],
        seconds=time.perf_counter() - started,
    )
    if left is not None:
        report.warnings.append(
            f"the checkpoint that was replaced cannot be removed; it is in {left}: remove it"
        )
    return report


@dataclass(frozen=True)
class _Job:
    """Everything decided before the first byte is written."""

    source: Checkpoint
    keys: KeyMap
    checked: Checked
    values: ExpertValues
    shards: list[OutShard]

    def bytes_needed(self) -> int:
        """Size of the output without the card and the record."""
        small = sum((self.source.folder / path).stat().st_size for path in self.source.small_files)
        weights = sum(shard.nbytes + len(shard.header()) for shard in self.shards)
        return weights + small + (self.source.folder / "config.json").stat().st_size


def _prepare(source: Checkpoint, matrices: Mapping[str, Tensor], *, trust: bool) -> _Job:
    """Decides everything; writes nothing."""
    source.check_copied()
    model = meta_model(load_config(source.folder, trust_remote_code=trust))
    layers = {layer.name: layer for layer in find_moe_layers(model)}
    _check_names(matrices, layers, source)
    quantization = quantization_of(source)
    if matrices:
        refuse_quantized(source.folder, quantization)
    keys = KeyMap(model)
    where = str(source.folder / "config.json")
    checked = check_source(source.tensors, keys, where, quantization)
    side = Side(keys, layers, source.tensors)
    changes = {name: NewExperts(tuple(range(layers[name].num_experts))) for name in matrices}
    values = ExpertValues(side, side, changes, matrices)
    actions: dict[str, Action] = {key: Copy(key) for key in source.tensors}
    actions |= {key: Compute(key, shape) for key, shape in values.shapes.items()}
    return _Job(source, keys, checked, values, plan_shards(source, actions, None))


def _check_names(
    matrices: Mapping[str, Tensor], layers: Mapping[str, MoELayer], source: Checkpoint
) -> None:
    """Raises PlanError unless the model has all layers that matrices are given for."""
    unknown = [name for name in matrices if name not in layers]
    if unknown:
        raise PlanError(
            f"matrices: {unknown[0]!r} is none of the layers of {source.folder}, whose first is "
            f"{next(iter(layers))!r}; give new down projections by the names of this model's "
            "experts modules."
        )


def _extra_files(source: Checkpoint, record: Mapping[str, Any], section: str) -> dict[str, bytes]:
    """Name -> content of the files that the output has and the source has not, or has otherwise."""
    content = {f"{RECORD}/{RECORD_FILE}": json.dumps(record, indent=2, ensure_ascii=False) + "\n"}
    card = source.folder / _CARD
    readable = is_file(card) and belongs(source.folder, card)
    text = card.read_text(encoding="utf-8", errors="replace") if readable else ""
    front, body = _front_matter(text)
    content[_CARD] = f"{front}{section}{body}"
    return {name: words.encode() for name, words in content.items()}


def _front_matter(card: str) -> tuple[str, str]:
    """A card divided after its front matter, which must stay first."""
    if card.startswith("---\n") and (end := card.find("\n---\n", 3)) >= 0:
        end += len("\n---\n")
        return card[:end] + "\n", card[end:].lstrip("\n")
    return "", card


def _write(
    job: _Job,
    staging: Path,
    extra: Mapping[str, bytes],
    threads: int | None,
    progress: Callable[[int], None],
) -> int:
    """Writes everything into the temporary folder, and verifies it; returns the size in bytes."""
    written = write_shards(staging, job.shards, progress, threads)
    written += write_index(staging, job.shards, job.source.index_metadata)
    for path in (Path("config.json"), *job.source.small_files):
        written += copy_file(job.source, path, staging, progress)
    record = job.source.folder / RECORD
    if record.is_dir() and belongs(job.source.folder, record):
        shutil.copytree(record, staging / RECORD, ignore=_links)
    (staging / RECORD).mkdir(exist_ok=True)
    for name, content in extra.items():
        (staging / name).write_bytes(content)
    write_computed(staging, job.shards, job.values, progress)
    tensors = [tensor for shard in job.shards for tensor in shard.tensors]
    check_output(tensors, job.keys, job.checked, {tensor.name: tensor.name for tensor in tensors})
    job.source.fingerprints.check()
    return written + sum(p.stat().st_size for p in (staging / RECORD).rglob("*") if p.is_file())


def _links(folder: str, names: list[str]) -> list[str]:
    """What of a folder of records is not copied: links, which may lead anywhere."""
    return [name for name in names if (Path(folder) / name).is_symlink()]
