"""Preparing batches while the model runs: one ahead, in one background thread."""

from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from reap_driver.base.threads import background

THREAD = "reap-prefetch"  # what the thread's name begins with


# A batch: token ids, or all arguments of a model.
BatchT = TypeVar("BatchT", Tensor, dict[str, Tensor])


def prefetched(batches: Iterable[BatchT], device: torch.device) -> Generator[BatchT, None, None]:
    """The same batches in the same order, each made while the one before is being used.

    For a CUDA device they are pinned, so that moving them there waits for nothing. An exception of
    `batches` is raised here, with its own traceback. Close the generator (`contextlib.closing`) to
    be sure that the thread ends with the loop: it finishes the batch in hand, and no other.

    Args:
        batches: made one at a time, never more than one ahead.
        device: where the model is.
    """
    source = iter(batches)
    with background(1, THREAD) as pool:
        coming = pool.submit(_next, source, device)
        while (batch := coming.result()) is not None:
            coming = pool.submit(_next, source, device)
            yield batch


def _next(source: Iterator[BatchT], device: torch.device) -> BatchT | None:
    """The next batch, ready to be moved; None after the last."""
    batch = next(source, None)
    return None if batch is None else ready_for(batch, device)


def ready_for(batch: BatchT, device: torch.device) -> BatchT:
    """The batch where moving it to `device` waits for nothing: in pinned memory for a GPU."""
    if device.type != "cuda":
        return batch
    if isinstance(batch, dict):
        return {name: tensor.pin_memory() for name, tensor in batch.items()}
    return batch.pin_memory()
