"""Checks that two checkpoints have the same vocabulary, so that predictions can be compared."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from reap_driver.compat.library_errors import wrap_errors
from reap_kernels.errors import CheckpointError, DataError

_FILE = "tokenizer.json"
# Files of tokenizers. Without any of them, transformers would make an empty tokenizer.
_FILES = ("tokenizer*", "vocab*", "*.tiktoken", "*.model")


def check_vocabularies(
    original: tuple[Path, PretrainedConfig],
    pruned: tuple[Path, PretrainedConfig],
    *,
    trust_remote_code: bool = False,
) -> None:
    """Checks that every token id stands for the same token in both models.

    For a checkpoint without a tokenizer, only the size of the vocabulary is compared.

    Args:
        original: folder and configuration of the original.
        pruned: folder and configuration of the pruned checkpoint.
        trust_remote_code: run tokenizer code that comes with the checkpoints.

    Raises:
        DataError: the vocabularies differ.
    """
    sizes = [config.get_text_config().vocab_size for _, config in (original, pruned)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{original[0]} has {sizes[0]} tokens, but {pruned[0]} has {sizes[1]}; compare a model "
            "with one that was made from it"
        )
    files = [folder / _FILE for folder, _ in (original, pruned)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    tokens = [_tokens(*model, trust_remote_code) for model in (original, pruned)]
    if None in tokens or tokens[0] == tokens[1]:
        return
    first, second = (set(found.items()) for found in tokens if found is not None)
    token, number = min(first ^ second, key=lambda entry: (entry[1], entry[0]))
    raise DataError(
        f"the tokenizers of {original[0]} and {pruned[0]} differ (first in token {number}, "
        f"{token!r}), so their predictions cannot be compared; compare a model with one that was "
        "made from it"
    )


def _tokens(folder: Path, config: PretrainedConfig, trust: bool) -> dict[str, int] | None:
    """Token -> id; None without a tokenizer."""
    if not any(found for pattern in _FILES for found in folder.glob(pattern)):
        return None
    try:
        with wrap_errors(f"the tokenizer of {folder} cannot be loaded", "check its files"):
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), config=config, trust_remote_code=trust
            )
    except CheckpointError:  # data may be token ids, which need no tokenizer
        return None
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary
