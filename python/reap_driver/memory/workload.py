"""The workload of a run: how many tokens, how long the sequences, and how large a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from reap_driver.files.gram_folder import file_bytes
from reap_driver.memory.batch_size import Footprint, footprint_of, full_batch
from reap_driver.model.discover import MoELayer
from reap_kernels import LayerGram


@dataclass(frozen=True)
class Workload:
    """The work to be done.

    Attributes:
        tokens: number of tokens in all data.
        seq_len: tokens per sequence.
        footprint: bytes of activations per token.
        full_batch: the batch size in sequences that keeps the processor busy, or the one requested.
        fixed: whether it was requested; if not, a smaller one is used if memory is short.
        grams: bytes of the Gram sums of each MoE layer; empty if none are wanted.
    """

    tokens: int
    seq_len: int
    footprint: Footprint
    full_batch: int
    fixed: bool = False
    grams: tuple[int, ...] = ()

    @property
    def smallest_batch(self) -> int:
        """The smallest batch size allowed, in sequences."""
        return self.full_batch if self.fixed else 1

    def batch(self, free: int | None) -> int:
        """The batch size, in sequences, with `free` bytes beside the model; None if unknown."""
        if self.fixed or free is None:
            return self.smallest_batch
        fitting = self.footprint.tokens_within(max(0, free)) // self.seq_len
        return max(1, min(self.full_batch, fitting))

    def activations(self, batch: int, free: int | None) -> int:
        """Upper estimate of a batch's bytes with `free` bytes beside the model; None if unknown."""
        tokens = min(batch * self.seq_len, self.tokens)
        limit = 4 * self.footprint.experts * tokens if free is None else max(0, free)
        return self.footprint.nbytes(tokens, limit)


def workload(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    *,
    tokens: int,
    seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None = None,
    all_logits: bool = False,
    gram: bool = False,
) -> Workload:
    """The workload of running a model on some data.

    Args:
        model: the model, on any device, the meta device included.
        layers: its MoE layers.
        tokens: number of tokens in all data.
        seq_len: tokens per sequence.
        device: the device that it will run on.
        dtype: the dtype that it will run in.
        batch_size: sequences per batch; None for as many as keep the device busy.
        all_logits: whether the logits of every token are needed.
        gram: whether Gram matrices are summed.
    """
    sequences = math.ceil(tokens / seq_len)
    wanted = full_batch(
        sequences=sequences,
        seq_len=seq_len,
        experts_per_choice=max(layer.num_experts / layer.top_k for layer in layers),
        accelerator=device.type != "cpu",
    )
    footprint = footprint_of(
        model, layers, seq_len, device=device, dtype=dtype, all_logits=all_logits
    )
    return Workload(
        tokens=tokens,
        seq_len=seq_len,
        footprint=footprint,
        full_batch=wanted if batch_size is None else min(batch_size, sequences),
        fixed=batch_size is not None,
        grams=gram_bytes(layers) if gram else (),
    )


def gram_bytes(layers: Sequence[MoELayer]) -> tuple[int, ...]:
    """Bytes of the Gram sums of each layer."""
    return tuple(
        LayerGram.nbytes_of(layer.local_experts, layer.intermediate_size) for layer in layers
    )


def gram_file_bytes(layers: Sequence[MoELayer]) -> tuple[int, ...]:
    """Bytes of the file of Gram matrices of each layer."""
    return tuple(file_bytes(layer.num_experts, layer.intermediate_size) for layer in layers)
