"""How many sequences to run at a time: enough to keep the processor busy, few enough to fit."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from reap_driver.compat.text_model import text_model
from reap_driver.model.discover import MoELayer

# Rows (tokens times top-k) an expert should get on average. With fewer, the grouped products wait
# for the experts' weights to be read; on an H200, arithmetic takes longer from 200 to 270 rows on.
ROWS_PER_EXPERT = 256
# On an accelerator also: what everything else (attention, norms, launches) needs to be efficient.
ACCELERATOR_TOKENS = 16384

# Vectors a token has at once in a decoder layer, by their width; peaks of Qwen3-MoE, Qwen3-Next and
# DeepSeek-V3 layers were measured at 0.3 to 0.95 of what they add up to. As wide as the model:
# residual, the norm's float32 copies, attention's output, routed and shared sums, temporaries.
_HIDDEN_VECTORS = 16
# As wide as the widest projection: queries, keys and values before and after rotation, and their
# parts; or gate, up and their product in a dense or shared MLP.
_WIDE_VECTORS = 8


@dataclass(frozen=True)
class Footprint:
    """Bytes of activations a token takes in a forward.

    Attributes:
        held: for as long as its layer runs.
        experts: for what lies between the experts' products, which the kernels compute in parts
            where all of it would take more than a quarter of the free memory.
    """

    held: int
    experts: int

    def tokens_within(self, free: int) -> int:
        """Tokens whose activations fit in half of `free` bytes."""
        undivided = free // 2 // (self.held + self.experts)
        divided = free // 4 // self.held  # the other quarter is the kernels'
        return max(undivided, divided)

    def nbytes(self, tokens: int, free: int) -> int:
        """What `tokens` take at most where `free` bytes are free before they run."""
        return self.held * tokens + min(self.experts * tokens, free // 4)


def full_batch(
    *, sequences: int, seq_len: int, experts_per_choice: float, accelerator: bool
) -> int:
    """Sequences that keep the processor busy, however much memory they take.

    Args:
        sequences: how many there are; never more are chosen.
        seq_len: tokens in each.
        experts_per_choice: num_experts / top_k, the largest of any layer.
        accelerator: whether the model is on one.
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
    """Estimates what a token takes, on the safe side: an estimate, not a bound.

    Args:
        itemsize: bytes of a number.
        hidden_size: width H of the model.
        widest: outputs of the widest linear layer, the logits' apart.
        logits: logits computed for every token; 0 where only the last token's are.
        eager_scores: heads * sequence length where attention keeps all scores, else 0.
        expert_values: the largest top_k * (H + I) of any layer.
    """
    held = itemsize * (_HIDDEN_VECTORS * hidden_size + _WIDE_VECTORS * widest)
    # Scores and logits are copied to float32, for the softmax.
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
        model: the model; on the meta device, say where it would run and in what.
        layers: its MoE layers.
        seq_len: tokens in a sequence.
        device: where it runs, by default where it is.
        dtype: what it runs in, by default its own.
        all_logits: whether the logits of every token are wanted, not only the last one's.
    """
    device = model.device if device is None else device
    itemsize = (model.dtype if dtype is None else dtype).itemsize
    config = model.config.get_text_config()
    head = text_model(model).get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    hidden = int(getattr(config, "hidden_size", layers[0].hidden_size))
    all_logits = all_logits or computes_all_logits(model)
    eager = config._attn_implementation == "eager"
    # A checkpoint's own code may call its heads otherwise; they are hardly ever narrower than 64.
    heads = int(getattr(config, "num_attention_heads", hidden // 64))
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
    """Whether the model can only compute every token's logits, not the last one's alone."""
    return "logits_to_keep" not in inspect.signature(type(text_model(model)).forward).parameters
