"""Reads and decodes the images of records.

An image is given as a path relative to the folder of the data file and inside it, a data URL,
base64 text, or bytes, by themselves or as `{"bytes": ..., "path": ...}` in data sets of the hub.
Nothing is downloaded. Images stay encoded until a batch needs them.
"""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from reap_driver.compat.library_errors import one_line, wrap_errors
from reap_driver.data.compressed_files import LARGEST
from reap_driver.data.records import Record
from reap_kernels.errors import DataError
from reap_kernels.files import is_file
from reap_kernels.schema import short

# Formats that are decoded: common ones of photographs and screenshots, no vector graphics.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def read_images(record: Record, given: Sequence[Any]) -> list[bytes]:
    """The encoded images of a record.

    Args:
        record: the record; paths are relative to its folder.
        given: for each image a path, a data URL, `{"base64": ...}`, bytes, or `{"bytes": ...,
            "path": ...}`.

    Raises:
        DataError: a file does not exist, an image would have to be downloaded or cannot be decoded,
            or all images together are too large. Names the record's place.
    """
    images: list[bytes] = []
    pixels, largest = 0, _most_pixels()
    for one in given:
        images.append(_content(record, one))
        nbytes = sum(map(len, images))
        if nbytes > LARGEST:
            raise _bad(record, f"brings them to {nbytes} bytes, above {LARGEST}", "give less")
        image = decode(images[-1], record.place)  # here, because the record is known
        pixels += image.width * image.height
        if pixels > largest:
            raise _bad(record, f"brings them to {pixels} pixels, above {largest}", "give less")
    return images


def decode(content: bytes, place: str) -> "Image":
    """Decodes an image to RGB.

    Raises:
        DataError: it cannot be decoded, or has too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    largest = _most_pixels()
    remedy = f"give one of {', '.join(_FORMATS)}"
    with (
        wrap_errors(f"{place}: an image cannot be decoded", remedy, error=DataError),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # about damaged metadata; sizes are checked below
        try:
            opened = Image.open(io.BytesIO(content), formats=_FORMATS)
        except UnidentifiedImageError:  # its message is only the address of an object
            raise ValueError("it has no known format") from None
        with opened as image:
            width, height = image.size
            if width * height > largest:
                raise DataError(
                    f"{place}: an image has {width} x {height} pixels, more than {largest}; give a "
                    "smaller one"
                )
            return image.convert("RGB")


def _most_pixels() -> int:
    """Pixels above which Pillow warns of a decompression bomb."""
    from PIL import Image

    return Image.MAX_IMAGE_PIXELS or 2**27


def _content(record: Record, given: Any) -> bytes:
    if isinstance(given, dict):
        if isinstance(given.get("bytes"), bytes):
            return bytes(given["bytes"])
        if isinstance(given.get("base64"), str):
            return _decoded(record, given["base64"])
        given = given.get("path") if given.get("bytes") is None else given
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str):
        raise _bad(record, f"is {short(given)}", "give a path, a data URL, or bytes")
    found = _DATA_URL.match(given)
    if found is not None:
        return _decoded(record, given[found.end() :])
    if given.lower().startswith("data:"):
        raise _bad(record, f"is {short(given)}", "give data:image/...;base64,...")
    if _ELSEWHERE.match(given):
        raise _bad(
            record,
            f"is {short(given)}, and nothing is downloaded",
            "give its file, as a path relative to the data file, or its bytes",
        )
    return _file(record, given)


def _decoded(record: Record, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise _bad(record, f"is no base64 ({one_line(error)})", "correct it") from error


def _file(record: Record, name: str) -> bytes:
    """The content of a file in the data's folder. Untrusted data must not reach other files."""
    if record.folder is None:
        raise _bad(
            record, f"is the path {short(name)}", "give bytes: this data has no folder of files"
        )
    folder = record.folder.resolve()
    try:
        path = (folder / Path(name)).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop of links
        raise _bad(
            record, f"is {short(name)}, no path ({one_line(error)})", "correct it"
        ) from error
    if not path.is_relative_to(folder):
        raise _bad(record, f"is {short(name)}, outside the folder of the data", "put it there")
    if not is_file(path):
        raise _bad(record, f"is {short(name)}, which is no file in {folder}", "put it there")
    try:
        with path.open("rb") as file:
            return file.read(LARGEST + 1)
    except OSError as error:
        raise _bad(record, f"is {short(name)} ({error.strerror})", "make it readable") from error


def _bad(record: Record, what: str, remedy: str) -> DataError:
    return DataError(f"{record.place}: an image {what}; {remedy}")
