"""Loading a whole model into memory for observation."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.compat.model_config import quantization_settings
from reap_driver.compat.partial_load import load_in_parts
from reap_driver.compat.pretrained import check_loading, from_checkpoint
from reap_driver.files.checkpoint import Checkpoint
from reap_driver.files.compressed_scheme import is_compressed
from reap_driver.load.compressed_matrices import plain_weights
from reap_driver.load.streamed_model import (
    checked_files,
    device_named,
    opened_model,
    text_layers_first,
)
from reap_driver.load.tensor_reader import TensorReader, stored
from reap_kernels.errors import UnsupportedModel


@typed
def load_model(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint for observation, in eval mode, quantised weights as plain floats: FP8,
    MXFP4, and what compressed-tensors stores in 4 or 8 bits.

    Args:
        path_or_id: folder of a checkpoint in safetensors, or a hub id.
        dtype: of the weights in memory; `auto` is the checkpoint's.
        device: where the model goes; nothing of it is held elsewhere on the way.
        device_map: several devices instead, as accelerate takes them ("auto", or module to device,
            "cpu" and "disk" included); such a model is observed in place. Not "disk" where
            compressed-tensors stored the weights.
        offload_folder: where "disk" of a device map keeps its weights.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: a shard is missing or truncated, a shape does not match the config, or the
            checkpoint lacks tensors the model needs, or brings experts it does not know; or a file
            was replaced while it was loaded.
        UnsupportedModel: see `load_config` and `model_class`; or the weights are stored in a format
            that is not read (docs/formats.md).
    """
    if device_map is not None:
        config, source = checked_files(path_or_id, trust_remote_code)
        with _read_by_library(path_or_id, config, source):
            model, info = from_checkpoint(
                path_or_id,
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                device_map=device_map,
                offload_folder=offload_folder,
            )
        check_loading(path_or_id, info, model)
        source.fingerprints.check()
        return model
    where = device_named(device)
    with opened_model(path_or_id, dtype, where, trust_remote_code, _layers_if_any) as streamed:
        for layer in range(len(streamed.layers)):
            streamed.load(layer)
        streamed.tie()
        return streamed.model


@contextmanager
def _read_by_library(
    path_or_id: str | Path, config: PretrainedConfig, source: Checkpoint
) -> Iterator[None]:
    """While active, the library's loading finds plain weights where compressed-tensors has none."""
    if not is_compressed(quantization_settings(config)):
        yield
        return
    with contextlib.closing(TensorReader(source.fingerprints)) as reader:
        found = stored(source.tensors, reader)
        tensors = plain_weights(
            found, quantization_settings(config), path_or_id, torch.device("cpu")
        )
        with load_in_parts(tensors, lambda model: []) as parts:
            yield
        if "disk" in getattr(parts.model, "hf_device_map", {}).values():
            # It would read weights from the checkpoint's files again, as they are stored.
            raise UnsupportedModel(
                f"{path_or_id}: device_map puts modules on disk, which what compressed-tensors "
                "stores cannot be read from; stream the model (open_streamed, --stream always)"
            )
        parts.restore()


def _layers_if_any(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Layers to load one by one, so that little is held twice; none: all at once."""
    try:
        return text_layers_first(model)
    except UnsupportedModel:  # whoever observes the model says so; it may be loaded
        return []
