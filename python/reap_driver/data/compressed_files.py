"""Compressed files as streams of the bytes in them: .gz, .bz2 and .xz by Python, .zst by Arrow.

What is read of any file is bounded, as a few bytes may decompress to more than memory holds: a
record has at most `LARGEST` bytes, and between two lines that hold something at most `BLANK` bytes
hold nothing.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from reap_kernels.errors import DataError

LARGEST = 16 * 2**20
BLANK = 2**20


def inner_suffix(file: Path) -> str:
    """`.jsonl` for a.jsonl and for a.jsonl.gz."""
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed as its name says.

    Raises:
        DataError: it cannot be read, its compression is damaged, or needs a missing package.
    """
    open_file = COMPRESSIONS.get(file.suffix, _plain)
    try:
        with open_file(file) as stream:
            yield stream
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(file, error) from error
    except OSError as error:  # bz2 and Arrow report damage as one without a number
        if error.errno is None and file.suffix in COMPRESSIONS:
            raise _damaged(file, error) from error
        raise DataError(f"data {file} cannot be read: {error.strerror or error}") from error


def lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, content) of the lines that hold something; None where that is too large.

    Raises:
        DataError: see `opened`; or too many empty lines follow each other.
    """
    number = blank = 0
    with opened(file) as stream:
        while line := stream.readline(LARGEST + 1):
            number += 1
            if len(line) > LARGEST:
                _skip(stream, line)
                yield number, None
            elif line.strip():
                blank = 0
                yield number, line
            else:
                blank += len(line)
                if blank > BLANK:
                    raise DataError(
                        f"data {file}: has more than {BLANK} bytes of empty lines up to line "
                        f"{number}; remove them"
                    )


def _skip(stream: IO[bytes], piece: bytes) -> None:
    """Reads on to the end of a line."""
    while piece and not piece.endswith(b"\n"):
        piece = stream.readline(BLANK)


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"data {file} cannot be decompressed ({error}); make or download the file again"
    )


def _buffered(module: Any) -> Callable[[Path], IO[bytes]]:
    return lambda file: io.BufferedReader(module.open(file))


def _plain(file: Path) -> IO[bytes]:
    return file.open("rb")


def _zstandard(file: Path) -> IO[bytes]:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"data {file}: reading .zst needs pyarrow, which is not installed; "
            "run `pip install reap-kernels[data]`, or decompress the file"
        ) from error
    stream: Any = pyarrow.input_stream(str(file), compression="zstd")
    return io.BufferedReader(stream)


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": _buffered(gzip),
    ".bz2": _buffered(bz2),
    ".xz": _buffered(lzma),
    ".zst": _zstandard,
}
