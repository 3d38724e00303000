"""The batch size: large enough to keep the processor busy, small enough to fit in memory."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from reap_driver.compat.layer_fields import layer_values
from reap_driver.compat.text_model import text_model
from reap_driver.model.discover import MoELayer

# Average number of rows per expert (tokens * top_k / num_experts) to aim for. With fewer, the
# grouped matrix products are bound by reading the experts' weights; on an H200 they become bound by
# arithmetic at 200 to 270 rows.
ROWS_PER_EXPERT = 256
# Smallest efficient number of tokens on an accelerator, for attention, norms and kernel launches.
ACCELERATOR_TOKENS = 16384

# Number of vectors per token that a decoder layer holds at its peak, by width. The measured peaks
# of Qwen3-MoE, Qwen3-Next and DeepSeek-V3 layers are 0.3 to 0.95 of these estimates. Of the model's
# width: residual, float32 copies in norms, attention output, routed and shared sums, temporaries.
_HIDDEN_VECTORS = 16
# Of the widest projection's width: queries, keys and values before and after rotary embedding and
# their slices; or the two halves of a dense or shared MLP and their product.
_WIDE_VECTORS = 8


@dataclass(frozen=True)
class Footprint:
    """Bytes of activations per token in a forward.

    Attributes:
        held: bytes that stay allocated while a layer runs.
        experts: bytes of the intermediate results of the experts. The kernels compute these in
            chunks if all of them would take more than a quarter of the free memory.
    """

    held: int
    experts: int

    def tokens_within(self, free: int) -> int:
        """Number of tokens whose activations fit in half of `free` bytes."""
        whole = free // 2 // (self.held + self.experts)
        in_chunks = free // 4 // self.held  # the kernels use the other quarter
        return max(whole, in_chunks)

    def nbytes(self, tokens: int, free: int) -> int:
        """Largest number of bytes that `tokens` take if `free` bytes are free before they run."""
        return self.held * tokens + min(self.experts * tokens, free // 4)


def full_batch(
    *, sequences: int, seq_len: int, experts_per_choice: float, accelerator: bool
) -> int:
    """Number of sequences per batch that keeps the processor busy, regardless of memory.

    Args:
        sequences: number of sequences in the data, the upper limit.
        seq_len: tokens per sequence.
        experts_per_choice: num_experts / top_k, the largest of all layers.
        accelerator: whether the model runs on an accelerator.
    """
    wanted = math.ceil(ROWS_PER_EXPERT * experts_per_choice)
    if accelerator:
        wanted = max(wanted, ACCELERATOR_TOKENS)
    return min(math.ceil(wanted / seq_len), sequences)


def token_footprint(
    *,
    itemsize: int,
    hidden_size: int,
    widest: int,
    logits: int,
    eager_scores: int,
    expert_values: int,
) -> Footprint:
    """A conservative estimate, not an upper bound, of the activations of a token.

    Args:
        itemsize: bytes per value.
        hidden_size: width H of the model.
        widest: output size of the widest linear layer, the language-model head excluded.
        logits: number of logits computed per token; 0 if only those of the last token are.
        eager_scores: heads * sequence length if attention materializes its scores, else 0.
        expert_values: top_k * (H + I), the largest of all layers.
    """
    held = itemsize * (_HIDDEN_VECTORS * hidden_size + _WIDE_VECTORS * widest)
    # Scores and logits are also copied to float32, for the softmax.
    held += (itemsize + 4) * (logits + eager_scores)
    return Footprint(held, itemsize * expert_values)


def footprint_of(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    seq_len: int,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    all_logits: bool = False,
) -> Footprint:
    """The footprint of a token in this model.

    Args:
        model: the model; if it is on the meta device, `device` and `dtype` are needed.
        layers: its MoE layers.
        seq_len: tokens per sequence.
        device: the device it runs on; by default the one it is on.
        dtype: the dtype it runs in; by default its own.
        all_logits: whether the logits of every token are needed, not only those of the last.
    """
    device = model.device if device is None else device
    itemsize = (model.dtype if dtype is None else dtype).itemsize
    config = model.config.get_text_config()
    head = text_model(model).get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    hidden = int(getattr(config, "hidden_size", layers[0].hidden_size))
    all_logits = all_logits or computes_all_logits(model)
    eager = config._attn_implementation == "eager"
    # Remote code may use another name; heads are hardly ever narrower than 64.
    named = [value for value in layer_values(config, "num_attention_heads") if value]
    heads = max(map(int, named), default=hidden // 64)
    return token_footprint(
        # CPUs without half-precision instructions compute in float32.
        itemsize=max(itemsize, 4) if device.type == "cpu" else itemsize,
        hidden_size=hidden,
        widest=max((m.out_features for m in linear), default=hidden),
        logits=int(config.vocab_size) if all_logits else 0,
        eager_scores=heads * seq_len if eager else 0,
        expert_values=max(la.top_k * (la.hidden_size + la.intermediate_size) for la in layers),
    )


def computes_all_logits(model: PreTrainedModel) -> bool:
    """Whether the model always computes the logits of every token (has no `logits_to_keep`)."""
    return "logits_to_keep" not in inspect.signature(type(text_model(model)).forward).parameters
