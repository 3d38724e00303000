"""Prepares the next batch in a background thread while the model runs."""

from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from reap_driver.base.threads import background

THREAD = "reap-prefetch"  # prefix of the thread's name


# A batch: token ids, or the arguments of a model.
BatchT = TypeVar("BatchT", Tensor, dict[str, Tensor])


def prefetched(batches: Iterable[BatchT], device: torch.device) -> Generator[BatchT, None, None]:
    """The same batches in the same order, each made while the previous one is being used.

    For a CUDA device they are in pinned memory, so that copying them there does not block. An
    exception of `batches` is raised here with its own traceback. Close the generator
    (`contextlib.closing`) to end the thread with the loop; it only finishes the current batch.

    Args:
        batches: an iterable, advanced at most one batch ahead.
        device: device of the model.
    """
    source = iter(batches)
    with background(1, THREAD) as pool:
        coming = pool.submit(_next, source, device)
        while (batch := coming.result()) is not None:
            coming = pool.submit(_next, source, device)
            yield batch


def _next(source: Iterator[BatchT], device: torch.device) -> BatchT | None:
    """The next batch, ready to be moved; None after the last one."""
    batch = next(source, None)
    return None if batch is None else ready_for(batch, device)


def ready_for(batch: BatchT, device: torch.device) -> BatchT:
    """The batch, in pinned memory if `device` is a GPU, so that copying it there does not block."""
    if device.type != "cuda":
        return batch
    if isinstance(batch, dict):
        return {name: tensor.pin_memory() for name, tensor in batch.items()}
    return batch.pin_memory()
