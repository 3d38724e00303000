"""Calibration data of a model: read, tokenized, packed, and made into batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import PretrainedConfig

from reap_driver.base.units import row
from reap_driver.data.batches import PackedBatches
from reap_driver.data.encode import Encoder
from reap_driver.data.hub import check_access
from reap_driver.data.packing import PackedSource, pack
from reap_driver.data.source import DataSource, HubDataset
from reap_driver.data.template_check import check_template
from reap_driver.data.template_file import TemplateFile, read_template
from reap_driver.data.token_cache import Cache
from reap_driver.model.discover import MoELayer
from reap_driver.observation.token_mask import takes_padding
from reap_driver.workflow.inspection import (
    Model,
    check_packing,
    inspect_model,
    sequence_length,
    take_masks,
)
from reap_driver.workflow.jobs import CalibrationOptions
from reap_driver.workflow.listener import Collector, Listener
from reap_driver.workflow.options import DataOptions, RunOptions
from reap_driver.workflow.results import Result
from reap_driver.workflow.sources import sources_of

# What of a source's provenance adds up.
_SUMMED = ("records", "sequences", "tokens", "counted_tokens")


@dataclass(frozen=True, repr=False)
class Calibration(Result):
    """Calibration data in batches, as `observe_data` runs a model on it.

    Attributes:
        sources: provenance of each source, as statistics record it.
        packed: the batches; `len()`, `group(n)` and `inputs(n)`.

    Example:
        >>> batches = rd.calibration("MODEL", "code.jsonl:40", seq_len=64)
        >>> group, inputs = next(iter(batches))
        >>> group, inputs["input_ids"].shape
        ('code', torch.Size([1, 64]))
    """

    sources: list[dict[str, Any]]
    packed: PackedBatches

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The group and the model's arguments of every batch."""
        for number in range(len(self.packed)):
            yield self.packed.group(number), self.packed.inputs(number)

    def facts(self) -> dict[str, Any]:
        """See `Result`."""
        return {"batches": len(self), "group_data": group_facts(self.sources), "data": self.sources}

    def describe(self) -> str:
        """See `Result`."""
        tokens = sum(source["tokens"] for source in self.sources)
        head = f"{tokens:,} tokens in {len(self):,} batches"
        return "\n".join([head, *group_lines(self.sources)])


def calibration(options: CalibrationOptions, listener: Listener | None = None) -> Calibration:
    """Reads the data of a model; see `reap_driver.calibration`."""
    heard = Collector(listener)
    path = str(options.model)
    model = inspect_model(path, trust_remote_code=options.trust_remote_code)
    run = RunOptions(trust_remote_code=options.trust_remote_code)
    seq_len = sequence_length(model, options.data, run)
    check_packing(model, options.data)
    wanted = sources_of(options, heard)
    sources = read_data(model, wanted, options.data, run, seq_len, heard)
    sizes = [min(options.batch_size, source.full_sequences) for source in sources]
    batches = batches_of(model.config, model.layers, sources, sizes)
    return Calibration(heard.notes, [source.provenance() for source in sources], batches)


def read_data(
    model: Model,
    wanted: Sequence[DataSource],
    data: DataOptions,
    run: RunOptions,
    seq_len: int,
    listener: Listener,
) -> list[PackedSource]:
    """Reads, tokenizes and packs all sources, or takes their tokens from the cache."""
    options: dict[str, Any] = {
        "trust_remote_code": run.trust_remote_code,
        "enable_thinking": data.enable_thinking,
        "answers_only": data.answers_only,
    }
    template = template_of(data)
    encoder = Encoder(model.path, model.config, **options, chat_template=template)
    for source in wanted:
        if isinstance(source.location, HubDataset):
            check_access(source.location)
    check_template(encoder, wanted, skip_bad=data.skip_bad)
    folder = _tokenizer_folder(model.path) if data.cache else None
    options["chat_template"] = None if template is None else template.digest
    made = pack if folder is None else Cache(folder, options, listener.note).pack
    with listener.progress("reading data", "tok") as progress:
        packed = [
            made(
                source,
                encoder,
                seq_len=seq_len,
                seed=data.seed,
                packing=data.packing,
                skip_bad=data.skip_bad,
                progress=progress.add,
            )
            for source in wanted
        ]
    for note in (note for one in packed for note in one.notes()):
        listener.note(note)
    return packed


def template_of(data: DataOptions) -> TemplateFile | None:
    """The chat template that the options name; None where they name none.

    Raises:
        DataError: its file holds none.
    """
    return None if data.chat_template is None else read_template(data.chat_template)


def _tokenizer_folder(model: str) -> Path | None:
    """Where a model's tokenizer is; of a hub id, the snapshot its configuration was read from."""
    if Path(model).is_dir():
        return Path(model)
    try:
        config = try_to_load_from_cache(model, "config.json")
    except ValueError:  # not the name of a repository either
        return None
    return Path(config).parent if isinstance(config, str) else None


def batches_of(
    config: PretrainedConfig,
    layers: Sequence[MoELayer],
    sources: Sequence[PackedSource],
    sizes: Sequence[int],
    folds: int = 1,
) -> PackedBatches:
    """The batches a model runs on.

    Args:
        config: of the model.
        layers: its MoE layers.
        sources: of `read_data`.
        sizes: for each source, sequences at a time.
        folds: shares that no batch crosses.
    """
    pad = takes_padding(config) and take_masks(layers)
    return PackedBatches(sources, sizes, folds=folds, pad=pad)


def group_facts(sources: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each group is made of.

    Args:
        sources: `provenance()` of packed sources, as statistics keep them.

    Returns:
        By group: records, skipped records, sequences, tokens, tokens that count, and the share of
        the latter in those of all groups.
    """
    whole = sum(source["counted_tokens"] for source in sources)
    groups: dict[str, dict[str, Any]] = {}
    for source in sources:
        facts = groups.setdefault(source["group"], dict.fromkeys((*_SUMMED, "skipped"), 0))
        for key in _SUMMED:
            facts[key] += source[key]
        facts["skipped"] += source.get("skipped", 0)
    for facts in groups.values():
        facts["share"] = facts["counted_tokens"] / whole
    return groups


def group_lines(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each group, where there is more to say than that there is one."""
    groups = group_facts(sources)
    lines = []
    for name, facts in groups.items():
        counted, skipped = facts["counted_tokens"], facts["skipped"]
        text = (
            f"{name}: {facts['tokens']:,} tokens of {facts['records']:,} records in "
            f"{facts['sequences']:,} sequences, {facts['share']:.1%} of all"
            + (f"; {counted:,} counted" if counted < facts["tokens"] else "")
            + (f"; {skipped:,} bad records left out" if skipped else "")
        )
        lines.append(row("", text, 2))
    plain = len(groups) == 1 and all(";" not in line for line in lines)
    return [] if plain else lines
