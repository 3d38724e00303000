"""Loads a checkpoint in parts: first everything but its decoder layers, then layers on request.

transformers' own `from_pretrained` builds the model and its conversion code makes every tensor;
this file only decides which keys are loaded when. Meanwhile it replaces three functions of the
library: the one that loads all keys, to load some of them; the one that puts a tensor into the
model, to assemble stacked experts; and the one that copies converters. Stacked experts are
converted a few at a time, so that memory does not hold a second copy of all of them.
"""

import contextlib
import copy
import logging
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, core_model_loading, modeling_utils
from transformers.core_model_loading import WeightConverter, dot_natural_key
from transformers.utils import logging as library_logging

from reap_driver.compat.conversion import KeyMap, Target
from reap_driver.compat.decoder_layers import owner_of
from reap_driver.compat.fp8 import partial_blocks
from reap_driver.compat.replacement import LIBRARY, replaced
from reap_kernels.errors import CheckpointError

_convert_and_load = core_model_loading.convert_and_load_state_dict_in_model
_set_param = core_model_loading.set_param_for_module

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"

_REMEDY = "use the config.json and weights of one and the same checkpoint"

# Bytes on disk that are read and converted at once.
CHUNK_BYTES = 128 << 20


class LazyTensor(ABC):
    """A tensor of a checkpoint that is read when it is indexed, like the library's own slices."""

    nbytes: int  # that reading and converting it takes in memory, for dividing layers into chunks

    @abstractmethod
    def __getitem__(self, index: Any) -> Tensor: ...

    @abstractmethod
    def get_dtype(self) -> str:
        """Its dtype, as safetensors names it."""

    @abstractmethod
    def get_shape(self) -> list[int]:
        """Its shape."""


@dataclass(frozen=True)
class Chunk:
    """Keys that are read and converted at once. Stacked experts may be spread over several chunks.

    Attributes:
        keys: the keys on disk.
        experts: model tensor of which this chunk makes only a part -> its total number of experts.
            The chunks of a tensor follow each other in the order of its experts.
    """

    keys: tuple[str, ...]
    experts: Mapping[str, int] = field(default_factory=dict)


class PartialLoad:
    """A model being loaded in parts. `load_in_parts` fills it while `from_pretrained` runs; its
    methods may be called after that.

    Attributes:
        model: the model; its decoder layers are on the meta device until they are loaded.
        layers: qualified name and module of every decoder layer.
    """

    model: PreTrainedModel
    layers: list[tuple[str, nn.Module]]

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        split: Callable[[PreTrainedModel], list[tuple[str, nn.Module]]],
    ) -> None:
        self._tensors, self._split = tensors, split
        self._chunks: list[list[Chunk]] = []
        self._blank: list[dict[str, Tensor]] = []
        self._load_config: Any = None
        self._keys: dict[str, list[str]] = {}
        self._loaded: dict[str, tuple[Tensor, int]] = {}

    def chunks(self, layer: int) -> list[Chunk]:
        """The chunks that a layer is loaded from, in order."""
        return self._chunks[layer]

    def load(self, chunks: Iterable[Chunk], layer: int, device: torch.device) -> None:
        """Reads and converts the chunks of one layer and puts its tensors into the model.

        Args:
            chunks: those of `chunks(layer)`.
            layer: index of the layer.
            device: where its tensors go.

        Raises:
            CheckpointError: a tensor cannot be converted, or has another shape than config.json
                gives.
        """
        gathered: dict[str, list[Tensor]] = {}
        refused: dict[str, list[int]] = {}
        config = replace(self._load_config, device_map={"": str(device)})
        part: Any = _Part(self.model, self._blank[layer])
        with _in_this_thread(), partial_blocks():
            for chunk in chunks:
                wanted = {key: self._tensors[key] for key in chunk.keys}
                with _placing(self._placer(chunk, gathered)):
                    info, _ = _converted(part, wanted, config)
                for name, text in info.conversion_errors.items():
                    why = " ".join(str(text).strip().splitlines()[-2:])  # after a traceback
                    raise CheckpointError(f"{name}: cannot be converted ({why[:300]}); {_REMEDY}")
                refused |= {name: list(shape) for name, shape, _ in info.mismatched_keys}
        for name, blank in self._blank[layer].items():
            found = _tensor(self.model, name)
            if found.is_meta or found.shape != blank.shape:
                shape = refused.get(name, "nothing" if found.is_meta else list(found.shape))
                raise CheckpointError(
                    f"{name}: the checkpoint gives {shape}, config.json says {list(blank.shape)}; "
                    f"{_REMEDY}"
                )

    def release(self, layer: int) -> None:
        """Puts a layer's tensors back on the meta device."""
        for name, blank in self._blank[layer].items():
            _put(self.model, name, blank)

    def tied(self) -> str | None:
        """Name of a tensor of a decoder layer that another module shares; None if there is none."""
        pairs = getattr(self.model, "all_tied_weights_keys", None) or {}
        tied = {*pairs, *pairs.values()}  # the checkpoint may use either name
        return next((name for blanks in self._blank for name in blanks if name in tied), None)

    def _placer(self, chunk: Chunk, gathered: dict[str, list[Tensor]]) -> Callable[..., None]:
        """The replacement for the library's function that puts a tensor into the model."""

        def place(
            model: PreTrainedModel, name: str, value: Tensor, info: Any, quantizer: Any
        ) -> None:
            total = chunk.experts.get(name)
            if total is None or len(value) == total:
                _set_param(model, name, value, info, quantizer)
                return
            if name not in gathered:
                whole = torch.empty(
                    (total, *value.shape[1:]), dtype=value.dtype, device=value.device
                )
                gathered[name] = [whole, whole]
            rest = gathered[name][1]
            if value.shape[1:] != rest.shape[1:]:
                raise CheckpointError(
                    f"{name}: its experts are of shapes {list(rest.shape[1:])} and "
                    f"{list(value.shape[1:])}; {_REMEDY}"
                )
            rest[: len(value)] = value
            gathered[name][1] = rest[len(value) :]
            if len(rest) == len(value):
                _set_param(model, name, gathered.pop(name)[0], info, quantizer)

        return place

    def _begin(self, model: PreTrainedModel, load_config: Any, offload: Any) -> Any:
        """Replaces the library's function that loads all keys: loads those outside decoder
        layers.
        """
        self.model, self._load_config = model, load_config
        self.layers = self._split(model)
        keys = KeyMap(model, load_config.weight_mapping)
        owners = {name: index for index, (name, _) in enumerate(self.layers)}
        outside: dict[str, LazyTensor] = {}
        inside: list[dict[str, Target]] = [{} for _ in self.layers]
        covered: list[set[str]] = [set() for _ in self.layers]
        for key in sorted(self._tensors, key=dot_natural_key):  # as the library; rules have states
            tensor, target = self._tensors[key], keys.locate(key)
            layer = owner_of(target.name, owners) if keys.known(target) else None
            owner = None if layer is None else owners[layer]
            if owner is None:
                outside[key] = tensor
                self._keys.setdefault(target.name, []).append(key)
            else:
                inside[owner][key] = target
                covered[owner].update(target.names)
        state = model.state_dict()
        self._blank = [{name: state[name] for name in names if name in state} for names in covered]
        self._chunks = [divide_into_chunks(keys, part, self._tensors) for part in inside]
        info, offload = _converted(model, outside, load_config, offload)
        for blanks in self._blank:
            info.missing_keys -= blanks.keys()
            for name in blanks:  # the library does not initialize what is marked as loaded
                _tensor(model, name)._is_hf_initialized = True  # type: ignore[attr-defined]
        self._loaded = {
            name: (_tensor(model, name), _tensor(model, name)._version)
            for name in state
            if name in self._keys and not _tensor(model, name).is_meta
        }
        return info, offload

    def restore(self) -> None:
        """Loads again the tensors outside decoder layers that the library changed after loading
        them.

        The library initializes modules whose buffers are not in the checkpoint; in some classes
        (zaya's router) that also writes to tensors that were loaded.
        """
        changed = [name for name, (t, version) in self._loaded.items() if t._version != version]
        keys = {key: self._tensors[key] for name in changed for key in self._keys[name]}
        if keys:
            with _in_this_thread(), partial_blocks():
                _converted(self.model, keys, self._load_config)
        self._loaded = {}


@contextlib.contextmanager
def load_in_parts(
    tensors: Mapping[str, LazyTensor],
    split: Callable[[PreTrainedModel], list[tuple[str, nn.Module]]],
) -> Iterator[PartialLoad]:
    """Inside, `from_pretrained` loads only what is outside the layers that `split` returns.

    Args:
        tensors: every tensor of the checkpoint, by its key.
        split: qualified names and modules of a model's decoder layers; if it returns none,
            everything is loaded.
    """
    parts = PartialLoad(tensors, split)

    def begin(
        model: PreTrainedModel, state_dict: Any, load_config: Any, disk_offload_index: Any = None
    ) -> Any:
        return parts._begin(model, load_config, disk_offload_index)

    loading = replaced(modeling_utils, "convert_and_load_state_dict_in_model", begin)
    with loading, _in_this_thread():
        yield parts


def divide_into_chunks(
    keys: KeyMap,
    targets: Mapping[str, Target],
    tensors: Mapping[str, LazyTensor],
    size: int = CHUNK_BYTES,
) -> list[Chunk]:
    """Divides the keys of one layer into chunks of about `size` bytes.

    Tensors that one conversion combines are in one chunk, unless it stacks experts and converts
    each expert by itself.

    Args:
        keys: key map of the model.
        targets: disk key -> where it goes, for the keys of the layer in the library's order.
        tensors: every tensor of the checkpoint, by its key.
        size: bytes per chunk.
    """
    groups: dict[str, dict[str, Target]] = {}
    for key, target in targets.items():
        groups.setdefault(target.name, {})[key] = target
    chunks: list[Chunk] = []
    small: list[str] = []
    held = 0
    for name, group in groups.items():
        lists = keys.expert_lists(group)
        if lists:
            chunks += _expert_chunks(name, lists, tensors, size)
            continue
        small += list(group)
        held += sum(tensors[key].nbytes for key in group)
        if held >= size:
            chunks.append(Chunk(tuple(small)))
            small, held = [], 0
    return [*chunks, Chunk(tuple(small))] if small else chunks


def _expert_chunks(
    target: str, lists: Sequence[Sequence[str]], tensors: Mapping[str, LazyTensor], size: int
) -> Iterator[Chunk]:
    """Chunks of stacked experts, each of several whole experts."""
    total = len(lists[0])
    each = sum(tensors[key].nbytes for keys in lists for key in keys) // total
    step = max(1, size // max(1, each))
    for first in range(0, total, step):
        part = tuple(key for keys in lists for key in keys[first : first + step])
        yield Chunk(part, {target: total})


class _Part:
    """A model of which loading sees only some tensors. The library lists all tensors and buffers of
    a model for each call, here for each chunk of each layer.
    """

    def __init__(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
        vars(self).update(_model=model, _state=state)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:  # what saving needs to know later
        setattr(vars(self)["_model"], name, value)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, on the meta device."""
        return dict(vars(self)["_state"])

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers matter only where modules are on disk, which these are not."""
        return iter(())


def _converted(model: PreTrainedModel, tensors: Any, load_config: Any, offload: Any = None) -> Any:
    """The library's own loading of tensors, without its copy of a converter for every key."""
    with replaced(core_model_loading, "deepcopy", _empty):
        return _convert_and_load(model, tensors, load_config, offload)


def _empty(converter: WeightConverter) -> WeightConverter:
    """A converter with the same rules that has collected no tensors.

    The library copies converters deeply, one for each key, and uses one for each model tensor. With
    the operations it copies what they refer to, such as the quantizer: a third of the time that
    loading a layer of many experts took.
    """
    made = copy.copy(converter)
    made.collected_tensors = defaultdict(list)
    made.layer_targets = defaultdict(set)
    return made


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    found: Tensor | None = {**module._buffers, **module._parameters}[leaf]
    assert found is not None, name
    return found


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor.detach(), requires_grad=False)
    else:
        module._buffers[leaf] = tensor


@contextlib.contextmanager
def _placing(place: Callable[..., None]) -> Iterator[None]:
    with replaced(core_model_loading, "set_param_for_module", place):
        yield


@contextlib.contextmanager
def _in_this_thread() -> Iterator[None]:
    """Inside, the library loads in the calling thread and shows no progress bars or reports, of
    which there would be one per part.

    `load.tensor_reader` reads ahead in threads of its own. On a GPU, all copies and conversions
    must go to one stream.

    One thread at a time is inside, since what is replaced meanwhile is the library's own: layers of
    several models may be loaded in the background at once.
    """
    with LIBRARY:
        yield from _quietly()


def _quietly() -> Iterator[None]:
    """What `_in_this_thread` changes."""
    shown = library_logging.is_progress_bar_enabled()
    logger = logging.getLogger("transformers.core_model_loading")
    level, before = logger.level, os.environ.get(_NO_THREADS)
    library_logging.disable_progress_bar()
    logger.setLevel(logging.CRITICAL)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            library_logging.enable_progress_bar()
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before
