"""Headers of safetensors files: parsing, checking and writing. Tensor data is not read here.

Layout (safetensors format specification): the length N of the header as 8 bytes, little-endian;
N bytes of JSON; the data.
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from reap_kernels.documents import open_file, parse_json
from reap_kernels.errors import CheckpointError
from reap_kernels.schema import short

# Bits per element. Types of less than a byte are packed.
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
MAX_HEADER_BYTES = 100_000_000  # the limit the safetensors library itself enforces
_PREFIX = 8
_MOST_DIMENSIONS = 64  # the limit of torch


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. `start` and `stop` are offsets from the start of the file, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start


@dataclass(frozen=True)
class SafetensorsFile:
    """The header of one file: its tensors in the order of their data, and its metadata."""

    path: Path
    size: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of this dtype and shape takes on disk."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def read_header(path: Path) -> SafetensorsFile:
    """Parses and checks the header of a file. Whatever the safetensors library refuses is refused.

    Raises:
        CheckpointError: it is not a safetensors file or is truncated, or its offsets do not match
            its shapes or its size.
    """
    try:
        with open_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = _header_length(path, stream.read(_PREFIX), size)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise _damaged(path, f"its header {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its __metadata__ is not an object of texts")
    base = _PREFIX + length
    entries = {key: _entry(path, key, value, base) for key, value in header.items()}
    tensors = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_coverage(path, tensors, base, size)
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise _damaged(
            path, f"the safetensors library refuses it ({short(str(error), 300)})"
        ) from error
    return SafetensorsFile(path, size, tensors, metadata)


def encode_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The header for tensors (name -> dtype, shape) whose data follows in this order without gaps.

    Padded with spaces so that the data begins at a multiple of 8 bytes, as the library does it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    """The length of the header, checked against the size of the file."""
    if len(prefix) < _PREFIX:
        raise _damaged(path, f"it has {size} bytes, fewer than a safetensors header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"it announces a header of {length} bytes, above {MAX_HEADER_BYTES}")
    if _PREFIX + length > size:
        raise _damaged(path, f"it announces a header of {length} bytes but has {size} bytes in all")
    return int(length)


def _entry(path: Path, key: str, value: Any, base: int) -> TensorEntry:
    """One entry of the header, checked by itself."""
    name = short(key, 300)
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sizes = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        valid = sizes and isinstance(dtype, str) and len(shape) <= _MOST_DIMENSIONS
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise _damaged(path, f"tensor {name} has the malformed entry {short(value, 300)}")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {short(dtype)}, known are "
            f"{', '.join(sorted(DTYPE_BITS))}; convert the tensor."
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if start > stop or 8 * (stop - start) != bits:
        raise _damaged(
            path,
            f"tensor {name} ({dtype} {short(shape)}, {short(bits)} bits) "
            f"claims offsets {start} to {stop}",
        )
    return TensorEntry(path, dtype, shape, base + start, base + stop)


def _check_coverage(path: Path, tensors: Mapping[str, TensorEntry], base: int, size: int) -> None:
    """Raises CheckpointError unless the data is contiguous up to the end of the file."""
    position = base
    for key, entry in tensors.items():
        if entry.stop > size:
            raise _damaged(
                path,
                f"tensor {short(key, 300)} ends at byte {entry.stop} but the file has {size} bytes",
            )
        if entry.start != position:
            raise _damaged(
                path,
                f"tensor {short(key, 300)} begins at byte {entry.start}, expected {position}",
            )
        position = entry.stop
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position} but the file has {size} bytes")


def _damaged(path: Path, what: str) -> CheckpointError:
    """The error for a damaged file."""
    return CheckpointError(
        f"{path}: damaged or truncated: {what}. Download or copy the file again."
    )
