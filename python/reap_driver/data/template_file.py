"""Reads a chat template from a file, to use instead of the tokenizer's."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.compat.library_errors import one_line
from reap_kernels.documents import parse_json, read_bytes, utf8
from reap_kernels.errors import DataError

_LARGEST = 2**22  # bytes; a tokenizer_config.json lists added tokens too
_NEEDS = "give a .jinja file, or a .json file with a chat_template, such as tokenizer_config.json"


@dataclass(frozen=True)
class TemplateFile:
    """A chat template.

    Attributes:
        path: its file.
        template: Jinja text; or several by name, as tokenizers have one for tools.
        digest: `sha256:` and the digest of the file.
    """

    path: str
    template: str | dict[str, str]
    digest: str


def read_template(path: str | Path) -> TemplateFile:
    """The chat template in a file: Jinja text, or a JSON object that holds it as `chat_template`.

    Raises:
        DataError: the file cannot be read or holds no template.
    """
    what = f"chat template '{one_line(str(path))}'"
    try:
        content = read_bytes(path, _LARGEST)
        text = utf8(content)
        value = parse_json(text, plain=False) if Path(path).suffix == ".json" else text
    except ValueError as error:
        raise DataError(f"{what} {error}; {_NEEDS}") from error
    template = value if isinstance(value, str) else _from_json(what, value)
    texts = [template] if isinstance(template, str) else list(template.values())
    if not texts or not all(one.strip() for one in texts):
        raise DataError(f"{what} is empty; {_NEEDS}")
    return TemplateFile(str(path), template, f"sha256:{hashlib.sha256(content).hexdigest()}")


def _from_json(what: str, value: Any) -> str | dict[str, str]:
    """`chat_template` of an object: a text, or a list of objects with `name` and `template`."""
    found = value.get("chat_template") if isinstance(value, dict) else None
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict)]
        found = {one.get("name"): one.get("template") for one in named} if named else None
    texts = [*found, *found.values()] if isinstance(found, dict) else [found]
    if not isinstance(found, str | dict) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{what} has no text as chat_template; {_NEEDS}")
    return found
