"""Models whose decoder layers are loaded one by one, for streaming or to load the whole model.

Tensors are read into memory with torch's own alignment. The library would map the files, where the
address of a tensor depends on the length of the header; some matrix products on the CPU round
differently at other alignments, so the same weights in other shards would give other results.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.base.threads import background
from reap_driver.compat.decoder_layers import decoder_layers
from reap_driver.compat.library_faults import check_runs
from reap_driver.compat.model_config import load_config
from reap_driver.compat.mtp_layer import attach_mtp, why_not_run
from reap_driver.compat.partial_load import Chunk, PartialLoad, load_in_parts
from reap_driver.compat.pretrained import check_loading, from_checkpoint, model_class
from reap_driver.compat.text_model import text_prefix
from reap_driver.files.checkpoint import Checkpoint, open_checkpoint, resolve_folder
from reap_driver.files.quantization import quantization_of
from reap_driver.load.methods import plain_weights
from reap_driver.load.storage import check_storage
from reap_driver.load.tensor_reader import Readable, TensorReader, start, stored
from reap_driver.model.discover import find_moe_layers
from reap_kernels.errors import UnsupportedModel, UsageError


@contextmanager
def open_streamed(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    with_mtp: bool = False,
) -> Iterator["StreamedModel"]:
    """Opens a checkpoint for streaming: its model, with the decoder layers on the meta device.

    The arguments are those of `load_model`.

    Raises:
        CheckpointError: see `load_model`. Errors in the values of a decoder layer are found when
            the layer is loaded; a changed file is found at the latest when the context ends.
        UnsupportedModel: see `load_model`; or a layer shares a tensor with another module and so
            cannot be loaded by itself.
    """
    where = device_named(device)
    split = text_layers_first
    opened = opened_model(path_or_id, dtype, where, trust_remote_code, split, with_mtp=with_mtp)
    with opened as streamed:
        tied = streamed.tied()
        if tied is not None:
            raise UnsupportedModel(
                f"{tied} of {type(streamed.model).__name__} shares its tensor with another module, "
                "so its layer cannot be loaded alone; observe the model with `stream='never'`"
            )
        yield streamed


class StreamedModel:
    """A model whose decoder layers are on the meta device except while they are loaded.

    Attributes:
        model: the model; everything but its decoder layers is loaded.
        layers: qualified names and modules of the decoder layers, those of the part that takes text
            first, otherwise in the model's order.
        device: where the model is.
        loaded: called with the index of every layer once its weights are there, in the thread that
            loads it.
    """

    def __init__(
        self,
        parts: PartialLoad,
        tensors: dict[str, Readable],
        reader: TensorReader,
        device: torch.device,
    ) -> None:
        self._parts, self._tensors, self._reader = parts, tensors, reader
        self.device = device
        self.model: PreTrainedModel = parts.model
        self.layers: list[tuple[str, nn.Module]] = parts.layers
        self.loaded: Callable[[int], Any] = lambda _: None
        self._pool = background(1, "reap-load")
        self._coming: dict[int, Future[None]] = {}
        self._stopped = threading.Event()
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def text_layers(self) -> list[tuple[str, nn.Module]]:
        """The `layers` that a forward runs, which come first. The others are of parts that take no
        text (a talker) and need not be loaded.
        """
        prefix = text_prefix(self.model)
        return [layer for layer in self.layers if layer[0].startswith(prefix)]

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from disk so far."""
        return self._reader.bytes_read

    def load(self, layer: int) -> None:
        """Loads a layer in the calling thread, with all of torch's threads.

        Raises:
            CheckpointError: it could not be read or converted.
        """
        self._load(layer)

    def prefetch(self, layer: int) -> None:
        """Starts to load a layer in the background; does nothing for an index past the last
        layer.
        """
        if layer >= len(self.layers) or layer in self._coming:
            return
        self._coming[layer] = self._pool.submit(self._load, layer)

    def ready(self, layer: int, timeout: float | None = None) -> bool:
        """Waits up to `timeout` seconds for a layer's weights; returns whether they are loaded.

        Raises:
            CheckpointError: they could not be read or converted.
        """
        self.prefetch(layer)
        coming = self._coming[layer]
        if not wait([coming], timeout).done:
            return False
        coming.result()
        return True

    def release(self, layer: int) -> None:
        """Frees a layer's weights."""
        if self._stream is not None:
            # The next layer to load reuses its memory, which queued kernels may still have to read.
            done = torch.cuda.current_stream(self.device).record_event()
            self._stream.wait_event(done)
        self._parts.release(layer)
        del self._coming[layer]

    def tied(self) -> str | None:
        """Name of a tensor of a decoder layer that another module shares; None if there is none."""
        return self._parts.tied()

    def tie(self) -> None:
        """Ties shared tensors again, which loading layers one by one separated."""
        if self.tied() is not None:
            away = {name for name, tensor in self.model.state_dict().items() if tensor.is_meta}
            self.model.tie_weights(missing_keys=away, recompute_mapping=False)

    def close(self) -> None:
        """Stops loading and ends the threads."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _load(self, layer: int) -> None:
        if self._stream is None:
            self._parts.load(self._read_ahead(layer), layer, self.device)
            self.loaded(layer)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self._parts.load(self._read_ahead(layer), layer, self.device)
            self.loaded(layer)
        self._stream.synchronize()

    def _read_ahead(self, layer: int) -> Iterator[Chunk]:
        """The chunks of a layer; the next one is being read while one is converted."""
        chunks = self._parts.chunks(layer)
        for number, chunk in enumerate(chunks):
            if self._stopped.is_set():
                raise InterruptedError("loading was stopped")
            for ahead in chunks[number + (number > 0) : number + 2]:
                start(self._tensors, ahead.keys)
            yield chunk


def device_named(device: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        UsageError: there is no such device.
    """
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} does not exist; give cpu, cuda or cuda:0") from error


@contextmanager
def opened_model(
    path_or_id: str | Path,
    dtype: str | torch.dtype,
    device: torch.device,
    trust: bool,
    split: Callable[[PreTrainedModel], list[tuple[str, nn.Module]]],
    *,
    with_mtp: bool = False,
) -> Iterator[StreamedModel]:
    """The model with everything loaded except the layers that `split` returns.

    Raises:
        UnsupportedModel: the multi-token-prediction layer is asked for and cannot be run.
    """
    config, source = checked_files(path_or_id, trust)
    reader = TensorReader(source.fingerprints)
    with contextlib.closing(reader):
        found = stored(source.tensors, reader)
        tensors = plain_weights(found, quantization_of(source), path_or_id, device)

        def divided(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
            if with_mtp:
                reason = why_not_run(model, source.tensors)
                if reason is not None:
                    raise mtp_refused(path_or_id, reason)
                attach_mtp(model)
            return split(model)

        with load_in_parts(tensors, divided) as parts:
            model, info = from_checkpoint(
                source.folder, config, dtype=dtype, trust_remote_code=trust
            )
        model.config.name_or_path = str(path_or_id)
        parts.restore()
        check_loading(path_or_id, without_zero_biases(info, tensors), model)
        if device.type != "cpu":
            model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        # Only now: page-locked memory is never freed, and tensors outside layers are read only
        # once.
        reader.pinned = device.type == "cuda"
        streamed = StreamedModel(parts, tensors, reader, device)
        try:
            yield streamed
        finally:
            streamed.close()
        source.fingerprints.check()


def without_zero_biases(info: dict[str, Any], tensors: Mapping[str, Readable]) -> dict[str, Any]:
    """The library's loading report without biases that the model does not have and that are zero,
    which older versions of AutoGPTQ gave every layer that they quantized.
    """

    def adds_nothing(key: str) -> bool:
        return key.endswith(".bias") and key in tensors and not tensors[key][...].any()

    unused = [key for key in info.get("unexpected_keys") or () if not adds_nothing(key)]
    return {**info, "unexpected_keys": unused}


def mtp_refused(path_or_id: str | Path, reason: str) -> UnsupportedModel:
    """The error for a multi-token-prediction layer that is asked for and cannot be run."""
    return UnsupportedModel(
        f"{path_or_id}: its multi-token-prediction layers cannot be observed: {reason}; leave out "
        "`with_mtp=True`, and prune them by the scores of the last layer (`mtp='prune'`)"
    )


def checked_files(path_or_id: str | Path, trust: bool) -> tuple[PretrainedConfig, Checkpoint]:
    """The configuration and the files of a checkpoint, both checked."""
    config = load_config(path_or_id, trust_remote_code=trust)
    check_runs(path_or_id, model_class(config))  # before a hub's files are downloaded
    source = open_checkpoint(resolve_folder(path_or_id))
    check_storage(path_or_id, config, quantization_of(source), source.tensors)
    return config, source


def text_layers_first(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Qualified names and modules of the decoder layers, those of the part that takes text
    first.
    """
    layers = decoder_layers(model, [layer.name for layer in find_moe_layers(model)])
    prefix = text_prefix(model)
    return sorted(layers, key=lambda layer: not layer[0].startswith(prefix))
