"""Sizes of a model: bytes per layer in memory, parameters, and operations per token.

Everything is derived from a model on the meta device, so a configuration is enough.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.compat.decoder_layers import decoder_layers, owner_of
from reap_driver.compat.layer_fields import query_heads
from reap_driver.compat.text_model import text_model, text_prefix
from reap_driver.memory.batch_size import computes_all_logits
from reap_driver.model.discover import MoELayer

# Config fields for the number of residual streams of hyper-connections.
_STREAM_COUNTS = ("hc_mult", "hc_count")


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of one model in the dtype it runs in.

    Attributes:
        architecture: name of the model's class.
        dtype: its dtype in memory, such as "bfloat16".
        layer_bytes: bytes of each decoder layer, in the model's order.
        rest_bytes: bytes of everything else: embeddings, head, final norm, encoders.
        parameters: number of parameters.
        active_parameters: parameters used per token: all but those of the experts that the token
            is not routed to; embeddings and head included, as model cards count them.
        seq_len: the sequence length that `flops_per_token` assumes.
        flops_per_token: average number of floating-point operations per token of a forward.
        state_bytes: bytes of a token's hidden state between two decoder layers.
    """

    architecture: str
    dtype: str
    layer_bytes: tuple[int, ...]
    rest_bytes: int
    parameters: int
    active_parameters: int
    seq_len: int
    flops_per_token: int
    state_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(self.layer_bytes) + self.rest_bytes

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest decoder layer."""
        return max(self.layer_bytes)

    @property
    def largest_pair(self) -> int:
        """Bytes of the largest two consecutive decoder layers."""
        return max((a + b for a, b in pairwise(self.layer_bytes)), default=self.largest_layer)


def model_sizes(
    model: PreTrainedModel, layers: Sequence[MoELayer], *, dtype: torch.dtype, seq_len: int
) -> ModelSizes:
    """Sizes of `model` in `dtype`.

    Args:
        model: the model, on any device, the meta device included, and in any dtype.
        layers: its MoE layers.
        dtype: dtype of its weights in memory, after dequantization.
        seq_len: tokens per sequence.

    Raises:
        UnsupportedModel: see `decoder_layers`.
    """
    model.tie_weights()  # a model built on the meta device is not tied yet
    decoders = decoder_layers(model, [layer.name for layer in layers])
    by_layer = dict.fromkeys([name for name, _ in decoders], 0)
    rest = 0
    for name, nbytes in tensor_bytes(model, dtype):
        owner = owner_of(name, by_layer)
        if owner is None:
            rest += nbytes
        else:
            by_layer[owner] += nbytes
    parameters = sum(p.numel() for p in model.parameters())
    idle = sum(_idle(layer, sum(p.numel() for p in layer.module.parameters())) for layer in layers)
    config = model.config.get_text_config()
    width = int(getattr(config, "hidden_size", layers[0].hidden_size))
    return ModelSizes(
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        layer_bytes=tuple(by_layer.values()),
        rest_bytes=rest,
        parameters=parameters,
        active_parameters=parameters - idle,
        seq_len=seq_len,
        flops_per_token=_flops(model, layers, decoders, seq_len),
        state_bytes=width * residual_streams(config) * dtype.itemsize,
    )


def residual_streams(config: PretrainedConfig) -> int:
    """Number of residual streams between layers: more than 1 with hyper-connections."""
    counts = (getattr(config, name, None) for name in _STREAM_COUNTS)
    return next((count for count in counts if isinstance(count, int)), 1)


def tensor_bytes(
    model: PreTrainedModel, dtype: torch.dtype, *, stored: bool = False
) -> Iterator[tuple[str, int]]:
    """Name and bytes of every tensor of the model; tied tensors are counted once.

    Loading casts floating-point tensors to `dtype`, except those that the model's class keeps in
    float32. Of these, files have vectors in float32 (correction biases), and matrices in `dtype`
    (routers, which newer library versions widen). Non-persistent buffers keep their dtype. Some
    router biases are created in float32 without being listed by the class; a model on the meta
    device does not show that (some kB).

    Args:
        model: the model, on any device.
        dtype: dtype of the model.
        stored: as in files, which contain no non-persistent buffers.
    """
    kept = _kept_in_float32(model, dtype)
    held = model.state_dict().keys()
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            if name not in held:
                if not stored:
                    yield name, tensor.nbytes
            elif not tensor.is_floating_point():
                yield name, tensor.nbytes
            else:
                wide = kept is not None and kept.search(name) is not None
                wide &= tensor.ndim < 2 or not stored
                yield name, tensor.numel() * (4 if wide else dtype.itemsize)


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Names that the model's class keeps in float32, by the rules of `from_pretrained`.

    One list applies to float16 only, the strict one to bfloat16 too; `*` matches any text.
    """
    names: list[str] = []
    if dtype == torch.float16:
        names += getattr(model, "_keep_in_fp32_modules", None) or ()
    if dtype in (torch.float16, torch.bfloat16):
        names += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return re.compile("|".join(name.replace("*", ".*") for name in names)) if names else None


def _idle(layer: MoELayer, numbers: int) -> int:
    """Of `numbers` values spread evenly over a layer's experts, those that a token does not use."""
    return numbers - numbers * layer.top_k // layer.num_experts


def _flops(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    decoders: Sequence[tuple[str, nn.Module]],
    seq_len: int,
) -> int:
    """Operations per token of the text model: two per multiplied weight, and those of attention.

    The head counts only if the model computes the logits of every token. Norms, activations and
    the recurrent states of linear attention are left out: they are small beside matrix products.
    """
    prefix = text_prefix(model)
    decoders = [(name, module) for name, module in decoders if name.startswith(prefix)]
    layers = [layer for layer in layers if layer.name.startswith(prefix)]
    matrices = sum(_multiplied(module) for _, module in decoders)
    matrices -= sum(_idle(layer, _multiplied(layer.module)) for layer in layers)
    head = text_model(model).get_output_embeddings()
    if head is not None and computes_all_logits(model):
        matrices += _multiplied(head)
    config = model.config.get_text_config()
    return 2 * matrices + sum(
        _attention(part, config, seq_len) for _, module in decoders for part in module.modules()
    )


def _multiplied(module: nn.Module) -> int:
    """Number of weights in the matrices that a token is multiplied by, embeddings excluded.

    Biases are recognized by name, because those of stacked experts have two dimensions.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(
        p.numel()
        for name, p in module.named_parameters()
        if p.ndim >= 2 and not name.endswith("bias") and id(p) not in tables
    )


def _attention(module: Any, config: PretrainedConfig, seq_len: int) -> int:
    """Operations per token for attention scores and weighted values, averaged over a sequence.

    2 * heads * (key width + value width) * attended positions. Attention is causal, so a token
    attends to (L + 1) / 2 positions on average, or fewer with a sliding window. Softmax attention
    in transformers is recognized by its `scaling`, which linear attention does not have. Sparse
    attention (an indexer's top k) counts as dense up to k positions; the indexer's own scores are
    left out.
    """
    key = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    if not isinstance(key, int) or not isinstance(getattr(module, "scaling", None), float):
        return 0
    value = getattr(module, "v_head_dim", None) or key
    limits = (getattr(module, "sliding_window", None), getattr(config, "index_topk", None))
    window = min([seq_len, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])
    # The first `window` tokens attend to 1, 2, ... positions, the others to `window` each.
    seen = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    return int(2 * query_heads(module, config) * (key + value) * seen)
