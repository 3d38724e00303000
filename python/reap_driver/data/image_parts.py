"""Finds the images of messages, in parts of their content or in a column of the record.

| given | the image is |
|---|---|
| a part `{"type": "image", "image" or "path" or "url" or "base64": ...}` | the value of that key |
| a part `{"type": "image_url", "image_url": {"url": ...}}` | at the URL |
| a part `{"type": "image"}`, or `<image>` in a text | the next one in column `images` or `image` |

In the messages, each image becomes a placeholder `{"type": "image"}`, which chat templates expect.
"""

import re
from typing import Any

from reap_driver.data.records import Record, unused
from reap_kernels.errors import DataError

PLACE = "<image>"
COLUMNS = ("images", "image")
_KINDS = ("image", "image_url")
_SOURCES = ("image", "path", "url", "base64", "image_url")
_GIVEN = "given"  # key of a part that holds its image until `take_images` removes it


def image_part(record: Record, what: str, part: dict[str, Any]) -> dict[str, Any] | None:
    """A part of a message in its checked form, if it is an image; None for other parts.

    Raises:
        DataError: it gives the image in several ways.
    """
    if part.get("type") not in _KINDS:
        return None
    named = {name: part[name] for name in _SOURCES if part.get(name) is not None}
    if len(named) > 1:
        raise DataError(
            f"{record.place}: {what} has an image with {' and '.join(named)}; give one of them"
        )
    record.unused.update(unused(part, ("type", "detail", *_SOURCES), "content[]."))
    image: dict[str, Any] = {"type": "image"}
    for name, given in named.items():
        if name == "image_url":
            given = given.get("url") if isinstance(given, dict) else given
        image[_GIVEN] = {"base64": given} if name == "base64" else given
    return image


def take_images(record: Record, messages: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Removes the images from messages, in place, leaving placeholders; returns them in order.

    Args:
        record: the record of the messages, which may have a column of images.
        messages: messages from `checked_messages`.

    Raises:
        DataError: the column and the messages have different numbers of images and placeholders.
    """
    column, name = _column(record)
    parts = [part for message in messages for part in _images_of(message)]
    if column and not parts:
        parts = [part for message in messages for part in _split(message)]
    bare = [part for part in parts if _GIVEN not in part]
    if name == "image" and not bare:  # another meaning of the name: the text has no placeholder
        record.unused.add(name)
        column = []
    if len(bare) != len(column):
        raise DataError(
            f"{record.place}: {len(column)} images beside the messages, and {len(bare)} places for "
            f'them; give one part {{"type": "image"}}, or one {PLACE} in a text, for each'
        )
    for part, given in zip(bare, column, strict=True):
        part[_GIVEN] = given
    return tuple(part.pop(_GIVEN) for part in parts)


def _column(record: Record) -> tuple[list[Any], str | None]:
    """The images in a column of the record, and the name of the column."""
    for name in COLUMNS:
        value = record.fields.get(name)
        if value not in (None, "", []):
            return (value if isinstance(value, list) else [value]), name
    return [], None


def _images_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return [part for part in parts if part["type"] == "image"]


def _split(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a text at its placeholders, in place; returns the image parts."""
    content = message.get("content")
    if not isinstance(content, str) or PLACE not in content:
        return []
    pieces = re.split(f"({re.escape(PLACE)})", content)
    message["content"] = [
        {"type": "image"} if piece == PLACE else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]
    return _images_of(message)
