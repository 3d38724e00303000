"""transformers' attention masks of packed sequences: made of what is known, never sought.

The library takes positions that do not follow each other for the beginning of another document. It
looks for them by asking the device in every forward, and not all of its models let it: gpt_oss and
afmoe keep their positions to themselves in 5.18, glm4v_moe and ernie4_5_vl_moe expand them before.
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
    """[batch, seq] int64: which document of its row a token is of; None where a row is but one.

    Args:
        position_ids: [batch, seq]; in a document they follow each other.
    """
    begins = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    return begins.cumsum(1) if bool(begins.any()) else None


@contextlib.contextmanager
def never_packed() -> Iterator[None]:
    """Inside, no documents are looked for in a sequence: the caller knows that there is but one.

    A streamed model has a forward a layer and batch, each of which would wait for the device.
    """
    with _replaced("find_packed_sequence_indices", lambda position_ids: None):
        yield


@contextlib.contextmanager
def packed(documents: Tensor) -> Iterator[None]:
    """Inside, every attention mask the library makes keeps these documents apart.

    Args:
        documents: [batch, seq], of `documents_of`.

    Raises:
        UnsupportedModel: when it ends, no mask was asked for: the model makes its own.
    """
    prepare = masking_utils._preprocess_mask_arguments
    signature = inspect.signature(prepare)
    made = 0

    def with_documents(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        bound = signature.bind(*args, **kwargs)
        # In place of positions, in which they then need not be found.
        bound.arguments["position_ids"] = _moved(documents, bound.arguments["inputs_embeds"].device)
        return prepare(*bound.args, **bound.kwargs)

    with (
        _replaced("_preprocess_mask_arguments", with_documents),
        _replaced("find_packed_sequence_indices", lambda documents: documents),
    ):
        yield
    if not made:
        raise UnsupportedModel(
            "the model asks the library for no attention mask, so documents packed in a sequence "
            "cannot be kept apart; pack with --packing concat, or none"
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for its queue."""
    on_gpu = device.type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)


@contextlib.contextmanager
def _replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, the library's own calls of one of its functions of masks go to another."""
    before = getattr(masking_utils, name)
    setattr(masking_utils, name, function)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)
