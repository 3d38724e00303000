"""The metadata of a source's card: what of them stays true for the pruned model."""

import re
from pathlib import Path
from typing import Any

from reap_driver.base.yaml_text import MAX_BYTES, parse_yaml
from reap_driver.files.checkpoint import Checkpoint, belongs
from reap_kernels.files import is_file

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def inherited_fields(source: Checkpoint) -> tuple[dict[str, Any] | None, str | None]:
    """Fields of the YAML between the first two `---` lines of README.md, texts or lists of texts.

    Returns:
        The fields and None; or None, where they cannot be read, and why. A broken card says nothing
        about the weights.

    Example:
        `license: mit` and `tags: [chat]` give `{"license": "mit", "tags": ["chat"]}`.
    """
    card = source.folder / "README.md"
    if not is_file(card):
        return {}, None
    try:
        fields = _read(source, card)
    except ValueError as error:
        return None, (
            f"{card}: {error}; so the new card repeats no license and no tags: add them by hand"
        )
    kept = {name: fields[name] for name in (*_INHERITED, "tags") if _is_text(fields.get(name))}
    return kept, None


def _read(source: Checkpoint, card: Path) -> dict[str, Any]:
    """All fields.

    Raises:
        ValueError: they cannot be read.
    """
    if not belongs(source.folder, card):
        raise ValueError(f"is a symbolic link to {card.readlink()}, no file of this checkpoint")
    try:
        with card.open("rb") as file:
            content = file.read(MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", content, re.DOTALL)
    fields = parse_yaml(found[1]) if found else {}
    if not isinstance(fields, dict | None):
        raise ValueError(f"its front matter is a {type(fields).__name__}, not fields with values")
    return fields or {}


def _is_text(value: Any) -> bool:
    """A text, or a list of texts."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) for text in texts)
