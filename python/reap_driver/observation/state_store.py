"""Stores the states of batches between two decoder layers: on the device, on the host, or in files.

State files have the same format in the journal's folder, so a journal needs no copies of them.
"""

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap_driver.base.threads import background
from reap_driver.memory.decision import Offload
from reap_driver.observation.batch_state import BatchState, check_skeleton
from reap_kernels.documents import Format
from reap_kernels.errors import DataError
from reap_kernels.files import sync
from reap_kernels.schema import Anything, Int, ListOf, Record, short
from reap_kernels.tensor_files import read_tensors, write_tensors

# Not sealed: the journal contains the digests of whole files.
FORMAT = Format(
    "reap-state",
    1,
    "state of a batch",
    {
        "layer": Int(-1, 1_000_000),
        "skeleton": Anything(),
        "tensors": ListOf(
            Record({"shape": ListOf(Int()), "strides": ListOf(Int()), "offset": Int(0, 63)})
        ),
    },
    DataError,
    "delete the journal's folder and start anew",
)

# Stored for a batch that no layer has run on yet.
_NONE = BatchState(-1, None)

# Largest number of elements of a tensor; an expanded one has more elements than memory.
_MOST = 2**48

# A copy has the same address modulo this (in bytes) as the original, because some matrix products
# round differently at other alignments.
_ALIGNMENT = 64


class StateStore:
    """The states of the batches of one process.

    Args:
        place: where the states are stored. On the device they are not copied; on the host and in
            files they are copies with the same values and strides.
        device: the device that the model runs on.
        folder: parent of the folders of state files, one per layer; needed for files only.
    """

    def __init__(self, place: Offload, device: torch.device, folder: Path | None = None) -> None:
        self._place: Offload = "device" if place == "host" and device.type == "cpu" else place
        self.device = device
        self._states: dict[int, BatchState] = {}
        self._loaded: Path | None = None
        self._files = _Files(folder) if folder is not None and place == "file" else None

    @property
    def in_files(self) -> bool:
        """Whether states are stored in files."""
        return self._files is not None

    @property
    def empty(self) -> bool:
        """Whether no state has been put or loaded."""
        return not self._states if self._files is None else self._files.empty

    def begin(self, position: int) -> None:
        """Starts a layer: states that are put from now on are those after `position` layers."""
        if self._files is not None:
            self._files.begin(position)

    def turn(self) -> None:
        """Ends a layer: `get` returns the states that were put since `begin`."""
        if self._files is not None:
            self._files.turn()

    def rewrite(self) -> None:
        """From now on, what is put replaces what `get` returns, batch by batch."""
        if self._files is not None:
            self._files.rewrite()

    def get(self, number: int, following: int | None) -> BatchState | None:
        """The state of a batch, on the device; None before its first layer.

        Args:
            number: number of the batch.
            following: number of the batch that will be requested next, to be read ahead.

        Raises:
            DataError: its file is missing or damaged.
        """
        if self._files is not None:
            state = self._files.get(number, following)
        else:
            state = self._states.get(number)
            if state is None and self._loaded is not None:
                raise FORMAT.refusal(_file(self._loaded, number), "is missing")
        if state is None or state.layer < 0:
            return None
        return state if self._place == "device" else state.moved(self._here)

    def put(self, number: int, state: BatchState | None) -> None:
        """Replaces the state of a batch; None if no layer has run on it yet."""
        state = _NONE if state is None else state
        if self._files is not None:
            self._files.put(number, state)
        else:
            self._states[number] = state.moved(_pinned) if self._place == "host" else state

    def save(self, folder: Path) -> None:
        """Writes all states to a folder and flushes them to disk."""
        if self._files is not None:
            self._files.flush(folder)
            return
        if self.device.type == "cuda":  # wait for asynchronous copies to pinned memory
            torch.cuda.synchronize(self.device)
        folder.mkdir(exist_ok=True)
        for number, state in self._states.items():
            write_state(_file(folder, number), state, flush=True)

    def load(self, folder: Path) -> None:
        """Loads the states that `save` wrote to a folder.

        Raises:
            DataError: a file is damaged. A missing file is detected by `get`.
        """
        if self._files is not None:
            self._files.resume(folder)
            return
        self._loaded = folder
        for path in sorted(folder.glob("*.safetensors")):
            if not (path.stem.isascii() and path.stem.isdigit()):
                raise FORMAT.refusal(path, "is not named after the number of a batch")
            state = read_state(path)
            self._states[int(path.stem)] = state.moved(
                self._here if self._place == "device" else _pinned
            )

    def _here(self, tensor: Tensor) -> Tensor:
        """The tensor on the device."""
        if tensor.device == self.device:
            return tensor
        return _copied(tensor, device=self.device)

    def close(self) -> None:
        """Ends the background thread."""
        if self._files is not None:
            self._files.close()


class _Files:
    """States in files; one background thread reads one folder and writes the next."""

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._source: Path | None = None
        self._target: Path | None = None
        self._pool = background(1, "reap-states")
        self._coming: tuple[int, Future[BatchState]] | None = None
        self._written: Future[None] | None = None

    @property
    def empty(self) -> bool:
        return self._source is None

    def begin(self, position: int) -> None:
        self._target = states_folder(self._root, position)
        shutil.rmtree(self._target, ignore_errors=True)  # left by a run that was killed
        self._target.mkdir(parents=True)

    def turn(self) -> None:
        self._finish()
        if self._source is not None:
            shutil.rmtree(self._source, ignore_errors=True)
        self._source, self._target = self._target, None

    def rewrite(self) -> None:
        self._target = self._source

    def resume(self, folder: Path) -> None:
        self._source = folder

    def get(self, number: int, following: int | None) -> BatchState | None:
        if self._source is None:
            return None
        if self._coming is None or self._coming[0] != number:
            self._coming = self._read(number)
        state = self._coming[1].result()
        self._coming = None if following is None else self._read(following)
        return state

    def put(self, number: int, state: BatchState) -> None:
        assert self._target is not None
        self._finish()  # at most one pending write, to bound memory
        if self._coming is not None and self._coming[0] == number:  # read before it is replaced
            self._coming = None
        host = state.moved(lambda t: t if t.device.type == "cpu" else _copied(t, device="cpu"))
        self._written = self._pool.submit(write_state, _file(self._target, number), host)

    def flush(self, folder: Path) -> None:
        self._finish()
        assert folder == self._target, (folder, self._target)
        for path in folder.iterdir():
            sync(path)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, number: int) -> tuple[int, Future[BatchState]]:
        assert self._source is not None
        return number, self._pool.submit(read_state, _file(self._source, number))

    def _finish(self) -> None:
        if self._written is not None:
            self._written.result()
            self._written = None


def states_folder(root: Path, position: int) -> Path:
    """The folder of the states after `position` layers."""
    return root / f"states-{position:05}"


def write_state(path: Path, state: BatchState, *, flush: bool = False) -> None:
    """Writes a state as one safetensors file.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    tensors = {
        str(number): _memory(tensor).to("cpu", copy=True)
        for number, tensor in enumerate(state.tensors)
    }
    places = [
        {"shape": list(t.shape), "strides": list(t.stride()), "offset": _offset(t)}
        for t in state.tensors
    ]
    content = {"layer": state.layer, "skeleton": state.skeleton, "tensors": places}
    write_tensors(tensors, path, FORMAT, content)
    if flush:
        sync(path)


def read_state(path: Path) -> BatchState:
    """Reads a state, onto the CPU, into newly allocated memory.

    Raises:
        DataError: the file is missing or damaged.
    """
    content, stored = read_tensors(path, FORMAT)
    places = content["tensors"]
    try:
        if stored.keys() != {str(number) for number in range(len(places))}:
            raise ValueError(f"has the tensors {short(sorted(stored))}, its header {len(places)}")
        if content["layer"] >= 0:
            check_skeleton(content["skeleton"], len(places))
        for number, place in enumerate(places):
            _check_place(stored[str(number)], number, place["shape"], place["strides"])
    except ValueError as error:
        raise FORMAT.refusal(path, str(error)) from error
    tensors = [
        _laid_out(stored[str(number)], place["shape"], place["strides"], place["offset"])
        for number, place in enumerate(places)
    ]
    return BatchState(content["layer"], content["skeleton"], tensors)


def _check_place(memory: Tensor, number: int, shape: list[int], strides: list[int]) -> None:
    """Checks that the memory of a tensor is as long as its shape and strides require.

    Raises:
        ValueError: it is not.
    """
    fits = memory.ndim == 1 and len(shape) == len(strides) and math.prod(shape) <= _MOST
    if not fits or len(memory) != _extent(shape, strides):
        raise ValueError(
            f"says that tensor {number} has shape {short(shape)} and strides {short(strides)}, "
            f"but holds {list(memory.shape)} of it"
        )


def _memory(tensor: Tensor) -> Tensor:
    """The memory of a tensor, from its first element to its last, in one dimension."""
    extent = _extent(tensor.shape, tensor.stride())
    return tensor.as_strided((extent,), (1,), tensor.storage_offset())


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Number of elements in memory from a tensor's first to its last."""
    sizes = zip(shape, strides, strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sizes) if all(shape) else 0


def _offset(tensor: Tensor) -> int:
    """Number of elements between a tensor and the aligned address before it."""
    return tensor.data_ptr() % _ALIGNMENT // tensor.element_size()


def _laid_out(
    memory: Tensor, shape: list[int], strides: list[int], offset: int, **where: Any
) -> Tensor:
    """A tensor of this shape and strides, in a copy of its memory."""
    copy = torch.empty(offset + len(memory), dtype=memory.dtype, **where)
    copy[offset:].copy_(memory, non_blocking=copy.is_pinned() or memory.is_pinned())
    return copy.as_strided(shape, strides, offset)


def _copied(tensor: Tensor, **where: Any) -> Tensor:
    """A copy of a tensor with the same strides; `where` are arguments of `torch.empty`."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    return _laid_out(_memory(tensor), shape, strides, _offset(tensor), **where)


def _pinned(tensor: Tensor) -> Tensor:
    """An asynchronous copy in pinned host memory, with the same strides."""
    return _copied(tensor, pin_memory=torch.cuda.is_available())


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"
