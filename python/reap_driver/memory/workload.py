"""From a model and its data to what `decide` wants to know."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from reap_driver.memory.batch_size import footprint_of, full_batch
from reap_driver.memory.decision import Workload
from reap_driver.model.discover import MoELayer


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
) -> Workload:
    """What is to run.

    Args:
        model: on the meta device or any other.
        layers: its MoE layers.
        tokens: of all data.
        seq_len: tokens in a sequence.
        device: where it will run.
        dtype: in what.
        batch_size: sequences at a time, None for as many as keep the device busy.
        all_logits: whether the logits of every token are wanted.
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
    )
