"""What commands share before a model runs on data: checks of what is cheap, and the data."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.base.units import short
from reap_driver.cli.console import Console
from reap_driver.cli.options import SEQ_LEN
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.data.batches import PackedBatches
from reap_driver.data.encode import Encoder
from reap_driver.data.packing import PackedSource, pack
from reap_driver.data.recipe import load_recipe
from reap_driver.data.source import DataSource
from reap_driver.data.token_cache import Cache
from reap_driver.files.checkpoint import Checkpoint, open_checkpoint, resolve_folder
from reap_driver.load.storage import check_storage
from reap_driver.model.discover import MoELayer, adapter_of, find_moe_layers, record_of
from reap_driver.model.isolation import check_isolation
from reap_driver.observation.data_parallel import Ranks
from reap_driver.observation.token_mask import takes_padding
from reap_driver.plan.criteria import Scores
from reap_driver.plan.scoring import shares
from reap_kernels import SaliencyStats, check_backend
from reap_kernels.errors import DataError, UnsupportedModel

# What of a source's provenance adds up.
_SUMMED = ("records", "sequences", "tokens", "counted_tokens")


@dataclass(frozen=True)
class Model:
    """What is known of a model before its weights are read.

    Attributes:
        path: folder or hub id, as given.
        config: its configuration.
        meta: the model on the meta device.
        layers: its MoE layers.
        provenance: `model` and `layers` as statistics record them.
    """

    path: str
    config: PretrainedConfig
    meta: PreTrainedModel
    layers: list[MoELayer]
    provenance: dict[str, dict[str, Any]]

    @cached_property
    def source(self) -> Checkpoint:
        """Its files, read and checked when they are first asked for: headers, no weights.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        return open_checkpoint(resolve_folder(self.path))

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file is not as it was when `source` was first asked for."""
        self.source.fingerprints.check()

    def check_files(self) -> None:
        """Raises before anything else is done what `source` would raise, and for weights in a
        format that cannot be observed.
        """
        check_storage(self.path, self.config, self.source.tensors, self.meta)

    def blank_scores(self) -> Scores:
        """Scores by id, the same for every layer: enough to plan how many experts go."""
        layers = self.provenance["layers"]
        values = {
            name: torch.arange(facts["num_experts"], dtype=torch.float64)
            for name, facts in layers.items()
        }
        return Scores(values, criterion="none", provenance=self.provenance)


def inspect_model(args: argparse.Namespace, path: str | None = None) -> Model:
    """Reads the configuration and finds the MoE layers on the meta device; no weights are read.

    Args:
        path: folder or hub id, default MODEL.

    Raises:
        CheckpointError, UnsupportedModel: there is no such model, or it cannot be observed.
    """
    path = str(args.model) if path is None else path
    config = load_config(path, trust_remote_code=args.trust_remote_code)
    meta = meta_model(config)
    try:
        layers = find_moe_layers(meta)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from error
    return Model(path, config, meta, layers, record_of(meta, layers, path))


def check_options(args: argparse.Namespace, config: PretrainedConfig) -> int:
    """Checks device, backend and length of sequences; returns the length.

    Raises:
        DataError: sequences longer than the model has positions.
        BackendUnavailable: no such backend, or it does not serve this device.
    """
    dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    check_backend("layer", device_of(args), dtype, args.backend)
    option = "--max-len" if args.packing == "none" else "--seq-len"
    asked = args.max_len if args.packing == "none" else args.seq_len
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(SEQ_LEN, longest) if isinstance(longest, int) else SEQ_LEN
    if isinstance(longest, int) and asked > longest:
        raise DataError(
            f"{option} {asked} is longer than the {longest} positions {args.model} was made for "
            f"(max_position_embeddings); give {option} {longest} or less"
        )
    return int(asked)


def check_packing(
    args: argparse.Namespace, config: PretrainedConfig, layers: Sequence[MoELayer]
) -> None:
    """Checks early that the model can be given what the data options ask for.

    Args:
        config: of the model, with its implementation of attention, as `meta_model` has it.
        layers: its MoE layers.

    Raises:
        UnsupportedModel: documents cannot be kept apart, or answers not counted alone.
    """
    if args.packing == "isolated":
        check_isolation(config)
    if args.answers_only and not _take_masks(layers):
        raise UnsupportedModel(
            f"{args.model}: a layer of it routes inside its block, so that no token can be left "
            "out; leave out --answers-only"
        )


def _take_masks(layers: Sequence[MoELayer]) -> bool:
    """Whether tokens can be left out in every layer."""
    return all(adapter_of(layer).takes_mask for layer in layers)


def check_groups(sources: Sequence[DataSource], weights: Mapping[str, float] | None) -> None:
    """Checks that weights name exactly the groups of the data.

    Raises:
        PlanError: they do not.
    """
    if weights is not None:
        shares(sorted({source.group for source in sources}), weights)


def device_of(args: argparse.Namespace, ranks: Ranks | None = None) -> torch.device:
    """The device asked for; `auto` is the first GPU where there is one, and for each rank its own.

    Raises:
        DataError: torch knows no such device, or it is not there.
    """
    if args.device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda" if ranks is None else f"cuda:{ranks.local_rank}")
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise DataError(
            f"--device {args.device}: not there ({reason}); `reap-kernels doctor` shows the devices"
        ) from error
    return device


def sources_of(args: argparse.Namespace) -> list[DataSource]:
    """What --recipe and --data name, in this order.

    Raises:
        DataError: there is no such recipe or data.
    """
    listed = [source for recipe in args.recipe for source in load_recipe(recipe)]
    return [*listed, *map(DataSource.parse, args.data)]


def read_data(
    args: argparse.Namespace,
    wanted: Sequence[DataSource],
    config: PretrainedConfig,
    seq_len: int,
    console: Console,
) -> list[PackedSource]:
    """Reads, tokenizes and packs all sources, or takes their tokens from the cache."""
    options = {
        "trust_remote_code": args.trust_remote_code,
        "enable_thinking": args.enable_thinking,
        "answers_only": args.answers_only,
    }
    encoder = Encoder(args.model, config, **options)
    folder = _tokenizer_folder(args.model) if args.cache else None
    made = pack if folder is None else Cache(folder, options, console.note).pack
    with console.progress("reading data", "tok") as progress:
        packed = [
            made(
                source,
                encoder,
                seq_len=seq_len,
                seed=args.seed,
                packing=args.packing,
                skip_bad=args.skip_bad,
                progress=progress.add,
            )
            for source in wanted
        ]
    for note in (note for one in packed for note in one.notes()):
        console.note(note)
    return packed


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
    pad = takes_padding(config) and _take_masks(layers)
    return PackedBatches(sources, sizes, folds=folds, pad=pad)


def summary(stats: SaliencyStats, seconds: float) -> tuple[dict[str, Any], str]:
    """What was observed, for machines and for people."""
    sources = stats.provenance["data"]
    tokens = sum(source["tokens"] for source in sources)
    never = {
        name: int((layer.total().count == 0).sum().item()) for name, layer in stats.layers.items()
    }
    unused, experts = sum(never.values()), sum(s.num_experts for s in stats.layers.values())
    facts = {
        "layers": len(stats.layers),
        "groups": stats.groups,
        "group_data": group_facts(sources),
        "parts": len(stats.parts),
        "data": sources,
        "tokens": tokens,
        "experts": experts,
        "experts_never_routed": unused,
        "observe_seconds": round(seconds, 3),
    }
    text = (
        f"observed {tokens:,} tokens in {len(stats.layers)} layers, {seconds:.1f} s "
        f"({short(tokens / seconds)} tokens/s); {unused} of {experts} experts were never routed to"
    )
    return facts, "\n".join([text, *group_lines(sources)])


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
        lines.append(
            f"  {name}: {facts['tokens']:,} tokens of {facts['records']:,} records in "
            f"{facts['sequences']:,} sequences, {facts['share']:.1%} of all"
            + (f"; {counted:,} counted" if counted < facts["tokens"] else "")
            + (f"; {skipped:,} bad records left out" if skipped else "")
        )
    plain = len(groups) == 1 and all(";" not in line for line in lines)
    return [] if plain else lines
