"""Gives transformers the boundaries of packed documents, from which it makes attention masks.

By itself, the library takes every break in `position_ids` for the start of a document. It searches
for breaks in every forward, which waits for the device, and not in all models: in 5.18, gpt_oss and
afmoe do not pass their positions on, glm4v_moe and ernie4_5_vl_moe pass them with more dimensions.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from reap_kernels.errors import UnsupportedModel


def documents_of(position_ids: Tensor) -> Tensor | None:
    """[batch, seq] int64: the index of each token's document in its row; None if every row is one
    document.

    Args:
        position_ids: [batch, seq]; consecutive within a document.
    """
    begins = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    return begins.cumsum(1) if bool(begins.any()) else None


@contextlib.contextmanager
def never_packed() -> Iterator[None]:
    """Inside, the library does not search for documents: the caller knows that no row is packed.

    A streamed model runs one forward per layer and batch, each of which would wait for the device.
    """
    with _replaced("find_packed_sequence_indices", lambda position_ids: None):
        yield


@contextlib.contextmanager
def packed(documents: Tensor) -> Iterator[None]:
    """Inside, every attention mask that the library makes keeps tokens to their own document.

    Args:
        documents: [batch, seq], from `documents_of`.

    Raises:
        UnsupportedModel: on exit, if the library made no mask: the model makes its own.
    """
    prepare = masking_utils._preprocess_mask_arguments
    signature = inspect.signature(prepare)
    made = 0

    def with_documents(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        bound = signature.bind(*args, **kwargs)
        # The document indices replace the positions that the library would derive them from.
        bound.arguments["position_ids"] = _moved(documents, bound.arguments["inputs_embeds"].device)
        return prepare(*bound.args, **bound.kwargs)

    with (
        _replaced("_preprocess_mask_arguments", with_documents),
        _replaced("find_packed_sequence_indices", lambda documents: documents),
    ):
        yield
    if not made:
        raise UnsupportedModel(
            "the model does not take its attention mask from the library, so documents packed in a "
            "sequence cannot be kept apart; pack with `packing='concat'`, or none"
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, copied without waiting for work that is queued there."""
    on_gpu = device.type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)


@contextlib.contextmanager
def _replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, the library's calls of one of its mask functions go to `function`."""
    before = getattr(masking_utils, name)
    setattr(masking_utils, name, function)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)
