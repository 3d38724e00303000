"""What `observe` and `prune` share before the model runs: checks of what is cheap, and the data."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.calibration import DataSource, Encoder, PackedSource, pack
from reap_driver.checkpoint.source import Source, open_source, resolve_folder
from reap_driver.commands.console import Console
from reap_driver.commands.options import SEQ_LEN
from reap_driver.compat.models import config_digest, load_config, meta_model
from reap_driver.criteria import Scores, shares
from reap_driver.discover import MoELayer, find_moe_layers
from reap_driver.distributed import Ranks
from reap_driver.sizing.units import short
from reap_kernels import SaliencyStats
from reap_kernels.dispatch import Request, select
from reap_kernels.errors import DataError, UnsupportedModel


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
    def source(self) -> Source:
        """Its files, read and checked when they are first asked for: headers, no weights.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        return open_source(resolve_folder(self.path))

    def check_files(self) -> None:
        """Raises what `source` would raise, before anything else is done."""
        _ = self.source

    def blank_scores(self) -> Scores:
        """Scores of 0 for every layer: enough to plan how many experts go."""
        layers = self.provenance["layers"]
        values = {
            name: torch.zeros(facts["num_experts"], dtype=torch.float64)
            for name, facts in layers.items()
        }
        return Scores(values, criterion="none", provenance=self.provenance)


def inspect_model(args: argparse.Namespace) -> Model:
    """Reads the configuration and finds the MoE layers on the meta device; no weights are read.

    Raises:
        CheckpointError, UnsupportedModel: there is no such model, or it cannot be observed.
    """
    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    meta = meta_model(config)
    try:
        layers = find_moe_layers(meta)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{args.model}: {error}") from error
    facts = {
        "id": str(args.model),
        "config_digest": config_digest(config),
        "model_type": type(config).model_type,
        "architecture": type(meta).__name__,
    }
    known = {"model": facts, "layers": {layer.name: layer.provenance() for layer in layers}}
    return Model(str(args.model), config, meta, layers, known)


def check_options(args: argparse.Namespace, config: PretrainedConfig) -> int:
    """Checks device, backend and length of sequences; returns the length.

    Raises:
        DataError: sequences longer than the model has positions.
        BackendUnavailable: no such backend, or it does not serve this device.
    """
    dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    select(Request("layer", device_of(args), dtype), args.backend)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if args.seq_len is None:
        return min(SEQ_LEN, longest) if isinstance(longest, int) else SEQ_LEN
    if isinstance(longest, int) and args.seq_len > longest:
        raise DataError(
            f"--seq-len {args.seq_len} is longer than the {longest} positions {args.model} was "
            f"made for (max_position_embeddings); give --seq-len {longest} or less"
        )
    return int(args.seq_len)


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


def read_data(
    args: argparse.Namespace,
    wanted: Sequence[DataSource],
    config: PretrainedConfig,
    seq_len: int,
    console: Console,
) -> list[PackedSource]:
    """Reads, tokenises and packs all sources."""
    encoder = Encoder(args.model, config, trust_remote_code=args.trust_remote_code)
    with console.progress("reading data", "tok") as progress:
        packed = [
            pack(source, encoder, seq_len=seq_len, seed=args.seed, progress=progress.add)
            for source in wanted
        ]
    for note in (note for one in packed for note in one.notes()):
        console.note(note)
    return packed


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
    return facts, text
