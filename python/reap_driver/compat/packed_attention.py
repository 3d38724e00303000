"""Gives transformers the boundaries of packed documents, from which it makes attention masks.

By itself, the library takes every break in `position_ids` for the start of a document. It searches
for breaks in every forward, which waits for the device, and not in all models: in 5.18, gpt_oss and
afmoe do not pass their positions on, glm4v_moe and ernie4_5_vl_moe pass them with more dimensions,
and masks of bidirectional attention are made without a search.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from reap_driver.compat.replacement import replaced
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
    with replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield


@contextlib.contextmanager
def packed(documents: Tensor) -> Iterator[None]:
    """Inside, every attention mask that the library makes keeps tokens to their own document.

    Args:
        documents: [batch, seq], from `documents_of`.

    Raises:
        UnsupportedModel: on exit, if the library made no mask: the model makes its own.
    """
    interfaces = _WithDocuments(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, documents)
    with never_packed(), replaced(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS", interfaces):
        yield
    if not interfaces.used:
        raise UnsupportedModel(
            "the model does not take its attention mask from the library, so documents packed in a "
            "sequence cannot be kept apart; pack with `packing='concat'`, or none"
        )


class _WithDocuments:
    """The library's functions that make masks, each given the boundaries as well. From 5.24 on the
    library itself needs positions beside the boundaries, which not all models pass on.

    Attributes:
        used: whether one has made a mask.
    """

    def __init__(self, interfaces: Any, documents: Tensor) -> None:
        self._interfaces, self._documents = interfaces, documents
        self.used = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interfaces, name)

    def __getitem__(self, implementation: str) -> Callable[..., Any]:
        interface = self._interfaces[implementation]

        def made(*, mask_function: Callable[..., Any], **options: Any) -> Any:
            self.used = True
            same = masking_utils.packed_sequence_mask_function(
                _moved(self._documents, options["device"])
            )
            skips = {name: False for name in options if name.endswith("_skip")}
            both = masking_utils.and_masks(mask_function, same)
            return interface(mask_function=both, **{**options, **skips})

        return made


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, copied without waiting for work that is queued there."""
    on_gpu = device.type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)
