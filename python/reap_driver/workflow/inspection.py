"""Inspects a model before its weights are read, and checks early how it is to run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.compat.model_config import load_config
from reap_driver.compat.mtp_layer import attach_mtp
from reap_driver.compat.pretrained import meta_model
from reap_driver.data.source import DataSource
from reap_driver.files.checkpoint import Checkpoint, open_checkpoint, resolve_folder
from reap_driver.files.quantization import quantization_of
from reap_driver.load.storage import check_storage
from reap_driver.model.discover import MoELayer, adapter_of, find_moe_layers, record_of
from reap_driver.model.isolation import check_isolation
from reap_driver.observation.data_parallel import Ranks
from reap_driver.planning.criteria import Scores
from reap_driver.planning.scoring import shares
from reap_driver.workflow.options import SEQ_LEN, DataOptions, RunOptions
from reap_kernels import check_backend
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
        mtp: whether its multi-token-prediction layer is observed, too.
    """

    path: str
    config: PretrainedConfig
    meta: PreTrainedModel
    layers: list[MoELayer]
    provenance: dict[str, dict[str, Any]]
    mtp: bool = False

    @cached_property
    def observed(self) -> tuple[PreTrainedModel, list[MoELayer]]:
        """The model as it is observed, on the meta device, and its MoE layers."""
        if not self.mtp:
            return self.meta, self.layers
        meta = meta_model(self.config)
        attach_mtp(meta)
        return meta, find_moe_layers(meta)

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
        quantization = quantization_of(self.source)
        check_storage(self.path, self.config, quantization, self.source.tensors, self.meta)

    def blank_scores(self) -> Scores:
        """Scores by id, the same for every layer that is observed: enough to plan how many experts
        go.
        """
        record = record_of(*self.observed, self.path) if self.mtp else self.provenance
        values = {
            name: torch.arange(facts["num_experts"], dtype=torch.float64)
            for name, facts in record["layers"].items()
        }
        return Scores(values, criterion="none", provenance=record)


def inspect_model(path: str, *, trust_remote_code: bool = False) -> Model:
    """Reads the configuration and finds the MoE layers on the meta device; no weights are read.

    Args:
        path: folder or hub id.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError, UnsupportedModel: there is no such model, or it cannot be observed.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    meta = meta_model(config)
    try:
        layers = find_moe_layers(meta)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from error
    return Model(path, config, meta, layers, record_of(meta, layers, path))


def sequence_length(model: Model, data: DataOptions, run: RunOptions) -> int:
    """The number of tokens in a sequence; device and backend are checked, too.

    Raises:
        DataError: sequences longer than the model has positions.
        BackendUnavailable: no such backend, or it does not serve this device.
    """
    dtype = torch.float32 if run.dtype == "auto" else getattr(torch, run.dtype)
    check_backend("layer", device_of(run), dtype, run.backend)
    return planned_length(model, data)


def planned_length(model: Model, data: DataOptions) -> int:
    """The number of tokens in a sequence, on whatever machine.

    Raises:
        DataError: sequences longer than the model has positions.
    """
    name = "max_len" if data.packing == "none" else "seq_len"
    asked = getattr(data, name)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(SEQ_LEN, longest) if isinstance(longest, int) else SEQ_LEN
    if isinstance(longest, int) and asked > longest:
        raise DataError(
            f"`{name}={asked}` is longer than the {longest} positions {model.path} was made for "
            f"(max_position_embeddings); give `{name}={longest}` or less"
        )
    return int(asked)


def check_packing(model: Model, data: DataOptions) -> None:
    """Checks early that the model can be given what the data options ask for.

    Raises:
        UnsupportedModel: documents cannot be kept apart, or answers not counted alone.
    """
    if data.packing == "isolated":
        check_isolation(model.meta.config)
    if data.answers_only and not take_masks(model.layers):
        raise UnsupportedModel(
            f"{model.path}: a layer of it routes inside its block, so that no token can be left "
            "out; leave out `answers_only=True`"
        )


def take_masks(layers: Sequence[MoELayer]) -> bool:
    """Whether tokens can be left out in every layer."""
    return all(adapter_of(layer).takes_mask for layer in layers)


def check_groups(sources: Sequence[DataSource], weights: Mapping[str, float] | None) -> None:
    """Checks that weights name exactly the groups of the data.

    Raises:
        PlanError: they do not.
    """
    if weights is not None:
        shares(sorted({source.group for source in sources}), weights)


def device_of(run: RunOptions, ranks: Ranks | None = None) -> torch.device:
    """The device asked for; `auto` is the first GPU where there is one, and for each rank its own.

    Raises:
        DataError: torch knows no such device, or it is not there.
    """
    if run.device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda" if ranks is None else f"cuda:{ranks.local_rank}")
    try:
        device = torch.device(run.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise DataError(
            f"`device={run.device}`: not there ({reason}); `reap-kernels doctor` shows the devices"
        ) from error
    return device
