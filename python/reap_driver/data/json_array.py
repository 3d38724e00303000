"""Reads JSON arrays of records, one record at a time, so that a file may be larger than memory."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from reap_driver.data.compressed_files import LARGEST, opened
from reap_kernels.errors import DataError

_CHUNK = 2**20  # bytes read at a time
_SPACE = " \t\r\n"
# Finds where an element ends; its numbers, which may have thousands of digits, are read later.
_decode = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str).raw_decode


def first_character(file: Path) -> str:
    """The first character of a file that is no white space; empty if there is none in the first
    megabyte.

    Raises:
        DataError: see `compressed_files.opened`.
    """
    with opened(file) as stream:
        start = stream.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    return start[:1].decode("latin-1")


def elements(file: Path) -> Iterator[str]:
    """The JSON text of each element of an array.

    Args:
        file: begins with `[`, but for white space.

    Raises:
        DataError: the file is no array, or an element is larger than `LARGEST`; names the element,
            counted from 1.
    """
    with opened(file) as stream:
        text = _Text(file, stream)
        number = 0
        text.skip("[", "array")
        while text.peek() != "]" or number:
            number += 1
            yield text.element(number)
            if text.peek() != ",":
                break
            text.skip(",", "comma")
        text.skip("]", f"comma or ] after record {number}")
        if text.peek():
            raise DataError(
                f"data {file}: something follows the array, after record {number}; correct the file"
            )


class _Text:
    """The text of a file from a position on, read as it is needed."""

    def __init__(self, file: Path, stream: IO[bytes]) -> None:
        self._file, self._stream = file, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False

    def _read(self, least: int = 0) -> bool:
        """Reads more, at least as much as `least`; False at the end of the file."""
        content = self._stream.read(max(_CHUNK, least))
        self._ended = not content
        try:
            more = self._decoder.decode(content, final=self._ended)
        except UnicodeDecodeError as error:
            raise DataError(
                f"data {self._file}: is not UTF-8 ({error.reason}); convert it"
            ) from error
        self._text, self._at = self._text[self._at :] + more, 0
        return not self._ended

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def skip(self, character: str, expected: str) -> None:
        """Goes past a character. Raises DataError if another one is next."""
        if self.peek() != character:
            raise DataError(
                f"data {self._file}: has no {expected}; correct the file, or write its records as "
                "JSON lines"
            )
        self._at += 1

    def element(self, number: int) -> str:
        """The next element, without white space around it."""
        self.peek()
        while True:
            size = len(self._text) - self._at
            try:
                _, end = _decode(self._text, self._at)
                if end < len(self._text) or self._ended or not self._read():  # a number may go on
                    break
            except (json.JSONDecodeError, RecursionError) as error:
                if self._ended or size > LARGEST:
                    raise self._refused(number, error, size) from error
                self._read(size)  # as much again, so that a long element is not decoded often
        if end - self._at > LARGEST:
            raise DataError(
                f"{self._file}, record {number}: is larger than {LARGEST} bytes; divide the record"
            )
        element, self._at = self._text[self._at : end], end
        return element

    def _refused(self, number: int, error: Exception, size: int) -> DataError:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        larger = f", or larger than {LARGEST} bytes" if size > LARGEST else ""
        return DataError(
            f"{self._file}, record {number}: is not JSON ({reason}){larger}; what follows cannot "
            "be read either, so correct it"
        )
