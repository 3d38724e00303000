"""Next-token predictions of a model that count; the model's head runs for no others.

A prediction is made at one token for the next. It counts if both tokens belong to the same document
and neither is padding, and if `token_mask`, where given, selects the next token.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reap_driver.compat.text_model import text_model
from reap_driver.data.prefetch import ready_for
from reap_driver.model.forward import forward
from reap_kernels.errors import DataError, UnsupportedModel


@dataclass(frozen=True)
class Predictions:
    """The n predictions of a batch that count, in the order of its tokens, on one device.

    Attributes:
        logits: [n, V], in the dtype that the model returns.
        labels: int64 [n], the tokens that follow.
        sequences: int64 [n], the row of the batch that each prediction is in.
    """

    logits: Tensor
    labels: Tensor
    sequences: Tensor


def counted_targets(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which predictions count.

    Args:
        inputs: `input_ids` int64 [batch, seq], and optionally, in the same shape:
            `attention_mask`, 0 on padding; `position_ids`, where a position that is not the
            previous one plus 1 begins a document; `token_mask` bool, the tokens that count.

    Returns:
        bool [batch, seq - 1], on the device of `input_ids`; entry t is for the prediction of token
        t + 1.

    Raises:
        DataError: `input_ids` is missing, or one of the other tensors is not [batch, seq].
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise DataError(
            "input_ids must be [batch, seq] to predict tokens, but "
            f"{'there are none' if ids is None else f'has shape {tuple(ids.shape)}'}; give token "
            "ids"
        )
    counted = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    for name in ("attention_mask", "position_ids", "token_mask"):
        tensor = inputs.get(name)
        if tensor is None:
            continue
        if tensor.shape != ids.shape:
            raise DataError(
                f"{name} has shape {tuple(tensor.shape)}, but input_ids has {tuple(ids.shape)}; "
                "give one entry per token"
            )
        tensor = tensor.to(ids.device)
        if name == "position_ids":
            counted &= tensor[:, 1:] == tensor[:, :-1] + 1
        else:
            counted &= tensor[:, 1:].bool()
        if name == "attention_mask":
            counted &= tensor[:, :-1].bool()
    return counted


def predict(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Predictions:
    """Runs a model on a batch, and its head only where a prediction counts.

    With inputs in main memory (pinned for a GPU), no step waits for the device.

    Args:
        model: a language model in eval mode, loaded or streamed.
        inputs: see `counted_targets`; `token_mask` is not passed to the model.

    Raises:
        DataError: see `counted_targets` and `reap_driver.model.forward.forward`.
        UnsupportedModel: the model has no language model head, or does not return one row of
            logits per token; or see `reap_driver.model.forward.forward`.
    """
    counted = counted_targets(inputs)
    ids = inputs["input_ids"]
    rows = nn.functional.pad(counted, (0, 1)).flatten().nonzero()[:, 0]
    batch = {name: tensor for name, tensor in inputs.items() if name != "token_mask"}
    with _head_at(model, rows, ids.shape):
        logits = forward(model, batch, all_logits=True).logits
    if logits.shape[:2] == ids.shape:  # the model uses its head's weight without calling the head
        logits = logits.flatten(0, 1)[_sent(rows, logits.device)]
    elif logits.shape[:2] == (1, len(rows)):
        logits = logits[0]
    else:
        raise UnsupportedModel(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} for "
            f"{tuple(ids.shape)} tokens, which this version cannot assign to tokens; compare a "
            "model that returns one row of logits per token"
        )
    labels = _sent(ids[:, 1:][counted], logits.device)
    sequences = _sent(counted.nonzero()[:, 0], logits.device)
    return Predictions(logits, labels, sequences)


@contextlib.contextmanager
def _head_at(model: PreTrainedModel, rows: Tensor, shape: torch.Size) -> Iterator[None]:
    """Inside the context, the model's head receives only `rows` of the hidden states, as one
    sequence.

    A head is linear, and models process each row of logits by itself (scales, soft caps, a wider
    dtype), so the position of a token in the batch does not matter. `logits_to_keep` cannot be used
    instead, because it selects the same positions in every sequence.
    """
    head = text_model(model).get_output_embeddings()
    if head is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no language model head, so it predicts no tokens; load "
            "the checkpoint as a language model"
        )

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != shape:
            return None
        return hidden.flatten(0, 1)[_sent(rows, hidden.device)].unsqueeze(0), *args[1:]

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy from main memory is queued without waiting."""
    if tensor.device.type == "cpu":
        return ready_for(tensor, device).to(device, non_blocking=True)
    return tensor.to(device)
