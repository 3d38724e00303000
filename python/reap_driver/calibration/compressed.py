"""Compressed files as streams of the bytes in them: .gz, .bz2 and .xz by Python, .zst by Arrow."""

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


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"data {file} cannot be decompressed ({error}); make or download the file again"
    )


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
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
