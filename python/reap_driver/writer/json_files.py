"""The JSON files of the output that differ from the source's: config.json, settings of quantizers,
and other files with counts of experts; and what files that are copied say about experts.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from reap_driver.compat.config_edit import count_sites, with_count
from reap_driver.files.checkpoint import Checkpoint, read_json
from reap_driver.files.quantization import SETTINGS_FIELDS, SETTINGS_FILES, method_of
from reap_driver.writer.expert_names import ExpertNames

_COUNTS_FILE = "params.json"  # Mistral's own configuration
_TEXTS = frozenset({".json", ".yaml", ".yml", ".csv", ".txt", ".log"})
_MAX_TEXT_BYTES = 64 << 20
_NAMED = re.compile(r"\bexperts(?:\\{0,2}\.|\[)\d+")


def rewritten_files(
    source: Checkpoint,
    config: Mapping[str, Any],
    names: ExpertNames,
    counts: Mapping[str, tuple[int, int]],
) -> dict[str, dict[str, Any]]:
    """Content of every JSON file that is rewritten, by name.

    Args:
        source: the checkpoint.
        config: its config.json with the new counts.
        names: rewrites what names experts by number.
        counts: experts of every layer, before and after.

    Raises:
        CheckpointError: a file is not a JSON object, or has an entry that cannot be rewritten with
            the same meaning.
    """
    where = f"{source.folder / 'config.json'}:"
    files = {"config.json": _rewrite_config(config, names, where)}
    for path in source.small_files:
        name = path.as_posix()
        if name in SETTINGS_FILES:
            content = read_json(source.folder / path, "restore the file")
            inner = content.get("quantization")
            method = method_of(inner if isinstance(inner, dict) else content, SETTINGS_FILES[name])
            files[name] = names.rewrite(content, f"{source.folder / path}: settings", method)
        elif name == _COUNTS_FILE:
            content = read_json(source.folder / path, "restore the file")
            before, after = (max(numbers) for numbers in zip(*counts.values(), strict=True))
            files[name] = with_count(content, count_sites(content, before), after)
    return files


def renamed_metadata(metadata: Mapping[str, str], names: ExpertNames) -> dict[str, str]:
    """The metadata of a safetensors file with experts renumbered: torchao describes tensors by name
    there, and lists the names.

    Raises:
        CheckpointError: an entry cannot be rewritten with the same meaning.
    """
    where = "metadata of a safetensors file:"
    listed = {}
    for name, value in metadata.items():
        listed[name] = value
        if value.startswith("[") and _NAMED.search(value):
            try:
                names_in = json.loads(value)
            except (ValueError, RecursionError):
                continue  # another kind of text, which is kept
            listed[name] = json.dumps(names.rewrite(names_in, f"{where} {name}", None))
    if not any(map(_NAMED.search, metadata)):
        return listed
    return {
        new: text for name, text in listed.items() for new in names.rewrite([name], where, None)
    }


def copied_names(source: Checkpoint, rewritten: Mapping[str, Any]) -> list[str]:
    """A sentence for every copied file that names experts by their numbers in the source, such as a
    log or a recipe of its quantization.
    """
    notes = []
    for path in source.small_files:
        file = source.folder / path
        text = path.suffix.lower() in _TEXTS and not path.name.startswith(("tokenizer", "vocab"))
        if not text or path.as_posix() in rewritten or file.stat().st_size > _MAX_TEXT_BYTES:
            continue
        found = _NAMED.search(file.read_text(encoding="utf-8", errors="replace"))
        if found is not None:
            notes.append(
                f"{path} is copied as it is and names experts by their numbers in the source "
                f"({found[0]!r} for one)."
            )
    return notes


def _rewrite_config(config: Mapping[str, Any], names: ExpertNames, where: str) -> dict[str, Any]:
    """config.json with the experts that settings of quantizers name renumbered, at any depth."""
    edited = dict(config)
    for name, value in config.items():
        if isinstance(value, dict) and name in SETTINGS_FIELDS:
            edited[name] = names.rewrite(value, f"{where} {name}", method_of(value, None))
        elif isinstance(value, dict):
            edited[name] = _rewrite_config(value, names, f"{where} {name}.")
    return edited
