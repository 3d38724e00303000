"""Reads plain and compressed files: .gz, .bz2 and .xz by Python, .zst by Arrow.

A few bytes may decompress to more than memory holds. So a record has at most `LARGEST` bytes, and
there are at most `BLANK` bytes of empty lines between two other lines.
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
    """The suffix of a name without that of the compression: `.jsonl` for a.jsonl and a.jsonl.gz."""
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading, decompressed according to its suffix.

    Raises:
        DataError: it cannot be read or decompressed, or its compression needs a package that is not
            installed.
    """
    open_file = COMPRESSIONS.get(file.suffix, _plain)
    try:
        with open_file(file) as stream:
            yield stream
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(file, error) from error
    except OSError as error:  # bz2 and Arrow report damage as an OSError without errno
        if error.errno is None and file.suffix in COMPRESSIONS:
            raise _damaged(file, error) from error
        raise DataError(f"data {file} cannot be read: {error.strerror or error}") from error


def lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, content) of the lines that are not empty; content is None if the line is
    larger than `LARGEST`.

    Raises:
        DataError: see `opened`; or there are too many empty lines in a row.
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
    """Reads up to the end of the line of which `piece` is the beginning."""
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
