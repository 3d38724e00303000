"""Next-token predictions of a model that count, and their logits: no others are computed or kept.

A prediction is made at a token and is about the next one. It counts where both are of one document
and no padding, and where the next one is a token that counts.
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
    """The n predictions of a batch that count, row after row, on the device of the logits.

    Attributes:
        logits: [n, V], in the dtype the model gives them.
        labels: [n] int64, the tokens that come.
        sequences: [n] int64, the row of the batch each is in.
    """

    logits: Tensor
    labels: Tensor
    sequences: Tensor


def counted_targets(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which predictions count.

    Args:
        inputs: `input_ids` [batch, seq], and of the same shape, each where it says something:
            `attention_mask`, 0 on padding; `position_ids`, of which one that does not follow the
            one before begins a document; `token_mask` bool, the tokens that count.

    Returns:
        [batch, seq - 1] bool, on the device of `input_ids`; entry t is of the prediction of token
        t + 1.

    Raises:
        DataError: there are no ids, or one of the others is not [batch, seq].
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise DataError(
            "predictions are of tokens: give input_ids [batch, seq], not "
            f"{'none' if ids is None else tuple(ids.shape)}"
        )
    counted = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    for name in ("attention_mask", "position_ids", "token_mask"):
        tensor = inputs.get(name)
        if tensor is None:
            continue
        if tensor.shape != ids.shape:
            raise DataError(
                f"{name} has shape {tuple(tensor.shape)}, so it does not say which predictions "
                f"count; give one entry a token, {tuple(ids.shape)}"
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
    """Runs a model on a batch; its head only where a prediction counts.

    With inputs in main memory (pinned for a GPU), nothing here waits for the device.

    Args:
        model: with a head over a vocabulary, in eval mode; loaded, or streamed.
        inputs: see `counted_targets`; `token_mask` is not given to the model.

    Raises:
        DataError: see `counted_targets` and `reap_driver.model.forward.forward`.
        UnsupportedModel: the model predicts no tokens, or gives not one row of logits for each; or
            see `reap_driver.model.forward.forward`.
    """
    counted = counted_targets(inputs)
    ids = inputs["input_ids"]
    rows = nn.functional.pad(counted, (0, 1)).flatten().nonzero()[:, 0]
    batch = {name: tensor for name, tensor in inputs.items() if name != "token_mask"}
    with _head_at(model, rows, ids.shape):
        logits = forward(model, batch, all_logits=True).logits
    if logits.shape[:2] == ids.shape:  # it does not call its head, but uses the weight
        logits = logits.flatten(0, 1)[_sent(rows, logits.device)]
    elif logits.shape[:2] == (1, len(rows)):
        logits = logits[0]
    else:
        raise UnsupportedModel(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} for "
            f"{tuple(ids.shape)} tokens; this version does not know which are whose"
        )
    labels = _sent(ids[:, 1:][counted], logits.device)
    sequences = _sent(counted.nonzero()[:, 0], logits.device)
    return Predictions(logits, labels, sequences)


@contextlib.contextmanager
def _head_at(model: PreTrainedModel, rows: Tensor, shape: torch.Size) -> Iterator[None]:
    """Inside, the model's head is given rows of the hidden states alone, as one sequence.

    A head is linear, and what models do with its logits (scales, soft caps, a wider dtype) is done
    to each; so where a token is in the batch does not matter. `logits_to_keep` would not do: what
    it keeps, it keeps of every sequence.
    """
    head = text_model(model).get_output_embeddings()
    if head is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no head over its vocabulary, so it predicts no tokens; "
            "load the checkpoint as a language model"
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
    """The tensor on the device; a move from main memory is queued, not waited for."""
    if tensor.device.type == "cpu":
        return ready_for(tensor, device).to(device, non_blocking=True)
    return tensor.to(device)
