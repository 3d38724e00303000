"""Size of the key-value cache of a model, from its attention modules on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.compat.cache_layers import CacheLayer, cache_layers
from reap_driver.compat.decoder_layers import decoder_layers
from reap_driver.compat.layer_fields import query_heads
from reap_driver.compat.text_model import text_model, text_prefix
from reap_driver.model.discover import MoELayer

# Recurrent states are kept in float32 by most kernels, whatever the dtype of the model.
_STATE_BYTES = 4


@dataclass
class CacheSize:
    """Bytes of the cache of one sequence.

    Attributes:
        per_token: bytes of a token in the layers that keep all tokens.
        per_window: {tokens that a layer keeps at most: bytes of a token in such layers}.
        state: bytes that do not depend on the number of tokens: convolutions, recurrent states.
        uncounted: classes of modules that keep something whose size is not known.
    """

    per_token: int = 0
    per_window: dict[int, int] = field(default_factory=dict)
    state: int = 0
    uncounted: set[str] = field(default_factory=set)

    def of(self, tokens: int) -> int:
        """Bytes for a number of tokens."""
        windows = sum(min(size, tokens) * nbytes for size, nbytes in self.per_window.items())
        return tokens * self.per_token + windows + self.state

    def add(self, window: int | None, nbytes: int) -> None:
        """Adds a layer's bytes of a token."""
        if window is None:
            self.per_token += nbytes
        else:
            self.per_window[window] = self.per_window.get(window, 0) + nbytes


def cache_size(model: PreTrainedModel, layers: Sequence[MoELayer], dtype: torch.dtype) -> CacheSize:
    """Size of the cache of the text model, as serving engines and transformers store it.

    Multi-head latent attention stores the compressed latent and the rotary key, once for all heads.
    A layer with a sliding window stores the tokens of the window.

    Args:
        model: the model, on any device.
        layers: its MoE layers.
        dtype: of keys and values.

    Raises:
        CheckpointError: the library cannot make a cache for this model.
    """
    part, prefix = text_model(model), text_prefix(model)
    config = part.config.get_text_config(decoder=True)
    known = cache_layers(part.config)
    by_layer: dict[int, list[nn.Module]] = {}
    for name, decoder in decoder_layers(model, [layer.name for layer in layers]):
        for module in decoder.modules() if name.startswith(prefix) else ():
            index = getattr(module, "layer_idx", None)
            if type(index) is int and index < len(known) and module is not decoder:
                by_layer.setdefault(index, []).append(module)
    size = CacheSize()
    for index, modules in by_layer.items():
        _add_layer(size, known[index], modules, config, dtype.itemsize)
    return size


def _add_layer(
    size: CacheSize,
    layer: CacheLayer,
    modules: Sequence[nn.Module],
    config: PretrainedConfig,
    itemsize: int,
) -> None:
    """Adds what the modules of one layer keep."""
    attention = [module for module in modules if _attends(module)]
    if layer.attends:
        values = sum(_key_values(module, config) for module in attention)
        values += sum(_index_keys(module) for module in modules if module not in attention)
        size.add(layer.window, values * itemsize)
    elif not layer.has_state:
        size.uncounted.add(layer.unknown or type(modules[0]).__name__)
    if layer.unknown is not None:
        size.uncounted.add(layer.unknown)
    if layer.has_state:
        convolution = sum(map(_convolution, modules))
        recurrent = sum(_recurrent(module) for module in modules if module not in attention)
        size.state += convolution * itemsize + recurrent * _STATE_BYTES
        if not convolution and not recurrent:
            size.uncounted.add(type(modules[0]).__name__)


def _attends(module: Any) -> bool:
    """Whether this is softmax attention, which in transformers has a `scaling`."""
    return isinstance(getattr(module, "scaling", None), float)


def _key_values(module: Any, config: PretrainedConfig) -> int:
    """Values that attention keeps for a token."""
    latent = _number(module, "kv_lora_rank")
    if latent:
        return latent + _number(module, "qk_rope_head_dim")
    key = _number(module, "qk_head_dim", "head_dim")
    value = _number(module, "v_head_dim") or key
    heads = _number(module, "num_key_value_heads")
    if not heads:
        heads = query_heads(module, config) // (_number(module, "num_key_value_groups") or 1)
    return heads * (key + value)


def _index_keys(module: Any) -> int:
    """Values that the indexer of sparse attention keeps for a token: one key for all heads."""
    is_indexer = type(module).__name__.endswith("Indexer")
    return _number(module, "index_head_dim", "head_dim") if is_indexer else 0


def _convolution(module: nn.Module) -> int:
    """Values of the last inputs of a module's short convolutions along the sequence."""
    if not _number(module, "conv_kernel_size"):
        return 0
    kernels = [child for child in module.children() if isinstance(child, nn.Conv1d)]
    return sum(kernel.in_channels * kernel.kernel_size[0] for kernel in kernels)


def _recurrent(module: Any) -> int:
    """Values of a module's recurrent state: a matrix per head, or a vector per channel."""
    state = _number(module, "ssm_state_size")
    heads = _number(module, "num_heads", "num_attention_heads")
    width = _number(module, "head_dim")
    if state:  # Mamba
        return (heads * width or _number(module, "intermediate_size")) * state
    keys, values = _number(module, "head_k_dim"), _number(module, "head_v_dim")
    if keys and values:  # gated delta rule
        return _number(module, "num_v_heads") * keys * values
    grouped = _number(module, "num_key_value_groups")  # the projections of softmax attention
    return 0 if grouped else heads * width * width


def _number(module: Any, *names: str) -> int:
    """The first of these attributes that is a number above 0; else 0."""
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if type(value) is int and value > 0), 0)
