"""transformers' search for packed sequences, which waits for the device, where there are none."""

import contextlib
from collections.abc import Collection, Iterator

from torch import Tensor
from transformers import masking_utils


def _none_packed(position_ids: Tensor) -> Tensor | None:
    return None


@contextlib.contextmanager
def unpacked(given: Collection[str]) -> Iterator[None]:
    """Inside, no packed sequences are looked for where a model is given token ids alone.

    Its positions are then its own, one after the other, and the library would find none: by asking
    the device in every forward, and a streamed model has one a layer and batch.

    Args:
        given: names of the arguments.
    """
    if set(given) != {"input_ids"}:
        yield
        return
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _none_packed
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search
