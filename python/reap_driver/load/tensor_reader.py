"""Reads tensors of a checkpoint in background threads, ahead of their use."""

import math
import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap_driver.base.threads import background
from reap_driver.compat.partial_load import LazyTensor
from reap_driver.files.fingerprints import Fingerprints, unreadable
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.files.shared_file import SharedFile
from reap_kernels.errors import CheckpointError

# Concurrent reads, and bytes per read: enough for the throughput of a fast disk.
THREADS = 4
_PIECE = 32 << 20

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
# Dtypes of weights that are not quantized.
PLAIN = frozenset({"BF16", "F16", "F32", "F64"})
# torch's names of the floats that quantizers dequantize to, as they write them -> the dtype.
FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class TensorReader:
    """Reads byte ranges of files into memory, in a few threads.

    Args:
        fingerprints: of the files when they were inspected; a file is checked when it is opened.

    Attributes:
        bytes_read: bytes read so far.
        pinned: whether to read into page-locked memory, from which a GPU copies fastest.
    """

    def __init__(self, fingerprints: Fingerprints | None = None) -> None:
        self._fingerprints = fingerprints or Fingerprints()
        self.bytes_read = 0
        self.pinned = False
        self._pool = background(THREADS, "reap-read")
        self._files: dict[Path, SharedFile] = {}
        self._lock = threading.Lock()

    def start(self, entry: TensorEntry, dtype: torch.dtype) -> "PendingTensor":
        """Starts to read a tensor."""
        memory = torch.empty(entry.nbytes, dtype=torch.uint8, pin_memory=self.pinned)
        view = memory.numpy().data
        pieces = [
            self._pool.submit(self._read, entry.file, entry.start + at, view[at : at + _PIECE])
            for at in range(0, entry.nbytes, _PIECE)
        ]
        return PendingTensor(memory.view(dtype).view(entry.shape), pieces)

    def close(self) -> None:
        """Ends the threads; reads that have not started are canceled."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _read(self, path: Path, start: int, view: memoryview) -> None:
        try:
            self._fill(path, self._open(path), start, view)
        except OSError as error:
            raise unreadable(path, error) from error

    def _fill(self, path: Path, file: SharedFile, start: int, view: memoryview) -> None:
        while view:
            count = file.read_into(view, start)
            if not count:
                raise CheckpointError(
                    f"{path}: ended at byte {start} while it was read; do not change the "
                    "checkpoint while it is observed"
                )
            view, start = view[count:], start + count
            with self._lock:
                self.bytes_read += count

    def _open(self, path: Path) -> SharedFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = SharedFile(path, self._fingerprints)
            return self._files[path]


class PendingTensor:
    """A tensor that is being read."""

    def __init__(self, tensor: Tensor, pieces: list[Future[None]]) -> None:
        self._tensor, self._pieces = tensor, pieces

    def wait(self) -> Tensor:
        """Waits until the tensor is complete, and returns it."""
        for piece in self._pieces:
            piece.result()
        return self._tensor


class Readable(LazyTensor):
    """A tensor that is read when it is indexed, or earlier if `start` is called."""

    @abstractmethod
    def start(self) -> None:
        """Starts to read."""


class StoredTensor(Readable):
    """A tensor in the form in which it is stored."""

    def __init__(self, key: str, entry: TensorEntry, reader: TensorReader) -> None:
        self._key, self._entry, self._reader = key, entry, reader
        self._reading: PendingTensor | None = None
        self.nbytes = entry.nbytes

    @property
    def file(self) -> Path:
        """The file that holds it."""
        return self._entry.file

    def start(self) -> None:
        """Starts to read."""
        if self._entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self._entry.file}: tensor {self._key!r} has dtype {self._entry.dtype}, which "
                f"cannot be read, {', '.join(DTYPES)} can; convert the tensor"
            )
        self._reading = self._reader.start(self._entry, DTYPES[self._entry.dtype])

    def __getitem__(self, index: Any) -> Tensor:
        if self._reading is None:
            self.start()
        assert self._reading is not None
        reading, self._reading = self._reading, None  # the caller owns its memory
        return reading.wait()[index]

    def get_dtype(self) -> str:
        return self._entry.dtype

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)


class Dequantized(Readable):
    """A matrix that is computed from its stored parts when it is indexed.

    Args:
        name: checkpoint and module, for error messages.
        parts: its tensors as stored, by the last part of their names.
        shape: its shape, (rows, columns).
        dtype: that of its values, as safetensors names it.
        device: where it is computed.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, StoredTensor],
        shape: tuple[int, ...],
        dtype: str,
        device: torch.device,
    ) -> None:
        self._name, self._parts, self._device = name, parts, device
        self._shape, self._dtype = shape, dtype
        # A chunk holds in memory the matrices that it makes, and for a while their parts.
        size = math.prod(shape) * DTYPES[dtype].itemsize
        self.nbytes = max(size, sum(part.nbytes for part in parts.values()))

    def start(self) -> None:
        """Starts to read."""
        for part in self._parts.values():
            part.start()

    def __getitem__(self, index: Any) -> Tensor:
        parts = {leaf: part[...].to(self._device) for leaf, part in self._parts.items()}
        return self._value(parts)[index]

    def get_dtype(self) -> str:
        return self._dtype

    def get_shape(self) -> list[int]:
        return list(self._shape)

    @abstractmethod
    def _value(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix, of the parts' values on the device."""


def is_plain(tensor: Readable) -> bool:
    """Whether a tensor holds ordinary floating-point numbers."""
    return tensor.get_dtype() in PLAIN


def stored(tensors: Mapping[str, TensorEntry], reader: TensorReader) -> dict[str, StoredTensor]:
    """Key -> tensor of a checkpoint, to be read by `reader`."""
    return {key: StoredTensor(key, entry, reader) for key, entry in tensors.items()}


def start(tensors: Mapping[str, Readable], keys: Iterable[str]) -> None:
    """Starts to read several tensors."""
    for key in keys:
        tensors[key].start()
