"""Loading a whole model into memory for observation."""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.compat.partial_load import load_in_parts
from reap_driver.compat.pretrained import check_loading, from_checkpoint
from reap_driver.files.checkpoint import Checkpoint
from reap_driver.files.quantization import quantization_of
from reap_driver.load.methods import plain_weights
from reap_driver.load.streamed_model import (
    checked_files,
    device_named,
    opened_model,
    text_layers_first,
    without_zero_biases,
)
from reap_driver.load.tensor_reader import Readable, TensorReader, stored
from reap_kernels.errors import UnsupportedModel, UsageError


@typed
def load_model(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    trust_remote_code: bool = False,
    with_mtp: bool = False,
) -> PreTrainedModel:
    """Load a model for observation, in eval mode, with quantized weights dequantized.

    docs/formats.md lists the formats that can be read.

    Args:
        path_or_id: folder of a checkpoint in safetensors format, or hub id.
        dtype: dtype of the weights in memory; "auto" for the checkpoint's.
        device: where the model goes. Weights are moved there as they are read, so no other device
            holds the whole model.
        device_map: several devices instead, as accelerate accepts them: "auto", or module name ->
            device, "cpu" and "disk" included. "disk" is only possible for formats that
            transformers reads itself: unquantized, FP8 and MXFP4.
        offload_folder: where modules on "disk" keep their weights.
        trust_remote_code: run model code that comes with the checkpoint.
        with_mtp: also load the multi-token-prediction layer, as one more decoder layer, which
            `observe` runs; the model's own forward leaves it out.

    Raises:
        UsageError: there is no such device; or `with_mtp` together with `device_map`.
        CheckpointError: a shard is missing or damaged, the tensors do not match config.json, or a
            file was changed while it was read.
        UnsupportedModel: transformers has no class for the model (see `load_config`), or the
            weights are stored in a format that cannot be read; or the multi-token-prediction layer
            cannot be run.

    Example:
        >>> model = rd.load_model("MODEL", dtype="float32")
        >>> model.training
        False
    """
    if device_map is not None:
        if with_mtp:
            raise UsageError(
                f"device_map {device_map!r} is not together with with_mtp=True; give `device`, or "
                "stream the model"
            )
        config, source = checked_files(path_or_id, trust_remote_code)
        with _read_by_library(path_or_id, source) as tensors:
            model, info = from_checkpoint(
                path_or_id,
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                device_map=device_map,
                offload_folder=offload_folder,
            )
            check_loading(path_or_id, without_zero_biases(info, tensors), model)
        source.fingerprints.check()
        return model
    where = device_named(device)
    split = _layers_if_any
    opened = opened_model(path_or_id, dtype, where, trust_remote_code, split, with_mtp=with_mtp)
    with opened as streamed:
        for layer in range(len(streamed.layers)):
            streamed.load(layer)
        streamed.tie()
        return streamed.model


@contextmanager
def _read_by_library(
    path_or_id: str | Path, source: Checkpoint
) -> Iterator[Mapping[str, Readable]]:
    """Inside, the library's loading gets the matrices that are dequantized here in place of the
    stored ones. Yields all tensors, by key.
    """
    with contextlib.closing(TensorReader(source.fingerprints)) as reader:
        found = stored(source.tensors, reader)
        tensors = plain_weights(found, quantization_of(source), path_or_id, torch.device("cpu"))
        if tensors == found:
            yield tensors
            return
        with load_in_parts(tensors, lambda model: []) as parts:
            yield tensors
        if "disk" in getattr(parts.model, "hf_device_map", {}).values():
            # accelerate would read the quantized weights from the checkpoint's files again.
            raise UnsupportedModel(
                f"{path_or_id}: device_map puts modules on disk, from where weights of "
                "this format cannot be read; stream the model (`stream='always'`)"
            )
        parts.restore()


def _layers_if_any(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Decoder layers, which are loaded one by one so that little is in memory twice; none
    if the model has no list of them.
    """
    try:
        return text_layers_first(model)
    except UnsupportedModel:  # such a model can be loaded; observing it raises this error
        return []
