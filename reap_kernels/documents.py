"""JSON that comes from elsewhere, read within limits: the one reader of all our formats.

Whatever a file holds, its reader gets a value of plain types or raises one error that names the
file. Refused are files above a size, nesting above a depth, names that an object has twice, texts
that cannot be encoded (lone surrogates), and numbers that no 64-bit type holds. What is written is
checked by the same kinds, so that it can be read.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

from reap_kernels.errors import ReapError
from reap_kernels.schema import (
    MAX_INT,
    Anything,
    Kind,
    Mismatch,
    Record,
    Text,
    UnknownField,
    check,
    short,
)

MAX_BYTES = 100_000_000  # the limit of the safetensors library for a header, which is JSON too
MAX_DEPTH = 64
# Of POSIX: does not wait for the other end of a pipe, and closes the file in other programs that
# are started. Windows has neither, nor pipes among its files.
_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_file(path: str | os.PathLike[str], *, follow: bool = True) -> BufferedReader:
    """Opens a file to read; a pipe or a device, which may never end, is refused.

    Args:
        path: of the file.
        follow: whether the file may be a symbolic link (Windows opens those in any case).

    Raises:
        OSError: it cannot be opened, or it is no file, with the reason as `strerror`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS | (0 if follow else _NO_LINKS))
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error)) from error
    except PermissionError as error:
        if os.path.isdir(path):  # Windows opens no folders
            raise OSError(errno.EINVAL, "a folder") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a folder" if stat.S_ISDIR(mode) else "no regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        ValueError: it cannot be read, with the system's reason, or it is larger.
    """
    try:
        with open_file(path) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    if len(content) > limit:
        raise ValueError(f"is larger than {limit} bytes")
    return content


def utf8(text: str | bytes) -> str:
    """A text, decoded if it is bytes; a byte order mark is passed over.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start})") from error


def parse_json(text: str | bytes, *, plain: bool = True) -> Any:
    """A JSON value within the limits of this module.

    Args:
        text: UTF-8 if bytes; a byte order mark is passed over.
        plain: whether to refuse numbers that JSON does not have or that no 64-bit type holds; other
            tools' files may hold Infinity, or an enormous integer for "no limit".

    Raises:
        ValueError: with the reason in plain words.

    Example:
        >>> parse_json(b'{"kept": [0, 2]}')
        {'kept': [0, 2]}
    """
    decoded = utf8(text)
    try:
        value = json.loads(decoded, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from error
    except _Twice:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"holds a number that cannot be read ({error})") from error
    check_values(value, plain=plain, texts=bool(_SURROGATE.search(decoded)))
    return value


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON text, with a question mark for each half of a surrogate pair, such as paths
    that are not UTF-8 are given.

    Raises:
        ValueError: it holds NaN or an infinity, which JSON does not have.
        TypeError: it holds something that JSON has no type for.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode()


def as_read(value: Any) -> Any:
    """A value as it is read back from the JSON it is written as."""
    return json.loads(to_json(value))


@dataclass(frozen=True)
class Format:
    """One of our file formats: a JSON object with `format`, `version` and fields of known kinds.

    Attributes:
        name: what `format` says.
        version: what `version` says; others are refused.
        what: the file in a message, such as "plan".
        fields, optional: kinds of the other fields.
        error: raised for whatever is wrong.
        remedy: what to do then, such as "make it again with `reap-kernels plan`".
        open: whether other fields may stand beside them, as in what is printed for all purposes.
        sealed: whether a field `digest` guards all others, and the data that go with them; for
            files that are not edited by hand.
        limit: bytes of the largest file.
    """

    name: str
    version: int
    what: str
    fields: Mapping[str, Kind]
    error: type[ReapError]
    remedy: str
    optional: Mapping[str, Kind] | None = None
    open: bool = False
    sealed: bool = False
    limit: int = MAX_BYTES

    def read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """The checked content of a file.

        Raises:
            ReapError: of the class `error`; the message names file, field, value and remedy.
        """
        try:
            content = read_bytes(path, self.limit)
        except ValueError as error:
            raise self.refusal(path, str(error)) from error
        return self.parse(content, path)

    def parse(
        self, text: str | bytes, where: object, data: Iterable[bytes | memoryview] = ()
    ) -> dict[str, Any]:
        """The checked content of a text.

        Args:
            text: what a file holds.
            where: names it in a message.
            data: what its digest guards besides.

        Raises:
            ReapError: see `read`.
        """
        try:
            content = parse_json(text)
            if not isinstance(content, dict) or content.get("format") != self.name:
                raise ValueError(f"is not a {self.what}: its format is not {self.name!r}")
            found = content.get("version")
            if type(found) is not int or found != self.version:
                newer = type(found) is int and found > self.version
                raise (_Newer if newer else ValueError)(
                    f"has version {short(found)}, this reap-kernels reads {self.version}"
                )
            check(content, self._kind())
            if self.sealed and content["digest"] != _digest(content, data):
                raise ValueError("is damaged: its content has another digest than it records")
        except UnknownField as error:
            first = "update reap-kernels if a newer one wrote it, or "
            raise self.refusal(where, str(error), ":", first) from error
        except Mismatch as error:
            raise self.refusal(where, str(error), ":") from error
        except _Newer as error:
            raise self.refusal(where, str(error), first="update reap-kernels, or ") from error
        except ValueError as error:
            raise self.refusal(where, str(error)) from error
        return content

    def complete(
        self, content: Mapping[str, Any], data: Iterable[bytes | memoryview] = ()
    ) -> dict[str, Any]:
        """What is to be written: `content` as it will be read, with `format`, `version` and, where
        the format is sealed, `digest`.

        Args:
            content: the other fields.
            data: what the digest guards besides.

        Raises:
            ReapError: of the class `error`: this could not be read again.
        """
        try:
            head = as_read({"format": self.name, "version": self.version, **content})
            if self.sealed:
                head["digest"] = _digest(head, data)
            check_values(head)
            check(head, self._kind())
        except Mismatch as error:
            raise self.error(f"{self.what}: {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise self.error(f"{self.what} cannot be written: {error}") from error
        return head

    def refusal(self, where: object, why: str, joint: str = "", first: str = "") -> ReapError:
        """The error about one file; `first` is a remedy that comes before the format's own."""
        name = where if isinstance(where, str | os.PathLike) else short(where)
        return self.error(f"{self.what} {name}{joint} {why}; {first}{self.remedy}")

    def _kind(self) -> Record:
        head: dict[str, Kind] = {"format": Text(), "version": Anything()}
        if self.sealed:
            head["digest"] = Text()
        return Record({**head, **self.fields}, self.optional or {}, self.open)


def _digest(content: Mapping[str, Any], data: Iterable[bytes | memoryview]) -> str:
    """`sha256:...` over all fields but `digest`, and `data`."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    found = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    for part in data:
        found.update(part)
    return f"sha256:{found.hexdigest()}"


class _Newer(ValueError):
    """A file has a newer version of its format."""


class _Twice(ValueError):
    """An object has a name twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _Twice(f"has the name {short(twice)} twice in one object")
    return value


def check_values(value: Any, *, plain: bool = True, texts: bool = True) -> None:
    """Checks depth, numbers and texts of a value that some parser made, without recursion.

    Args:
        value: of dictionaries, lists and plain values; it must not contain itself.
        plain: see `parse_json`.
        texts: whether to look for texts that cannot be encoded.

    Raises:
        ValueError: with the reason in plain words.
    """
    level = [value]
    for depth in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict | list):
                if depth == MAX_DEPTH:
                    raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
                below.extend(item.values() if isinstance(item, dict) else item)
                if texts and isinstance(item, dict):
                    below.extend(item)
            elif isinstance(item, str):
                if texts:
                    _check_text(item)
            elif plain and isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"holds the number {item}, which JSON does not have")
            elif plain and isinstance(item, int) and not -MAX_INT - 1 <= item <= MAX_INT:
                raise ValueError(f"holds the number {short(item)}, which 64 bits do not hold")
        level = below


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds a text that no encoding writes, {short(text)}: half of a surrogate pair"
        ) from error
