"""Loads a model's tokenizer, whose files are untrusted."""

import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from reap_driver.compat.library_errors import wrap_errors
from reap_kernels.documents import parse_json, read_bytes
from reap_kernels.errors import DataError
from reap_kernels.files import is_file
from reap_kernels.schema import short

# Upper bound of token ids: the tokenizers library iterates up to the largest id of a vocabulary.
_IDS = 2**24
_LARGE = re.compile(rb":\s*[1-9][0-9]{7}")


def load_tokenizer(
    model: str | Path, config: PretrainedConfig, what: str, *, trust_remote_code: bool
) -> Any:
    """The tokenizer of a model, without truncation or padding.

    Args:
        model: folder or hub id.
        config: configuration of the model.
        what: beginning of error messages, which says what needs the tokenizer.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        DataError: its files are missing or damaged, or need code that is not available.
    """
    remedy = (
        "add its files (tokenizer.json, ...), allow its code with `trust_remote_code=True`, or "
        "give records with input_ids"
    )
    with wrap_errors(f"{what}, which cannot be loaded", remedy, error=DataError):
        _check_ids(Path(model) / "tokenizer.json")
        # Given the config, AutoTokenizer need not resolve a model_type it does not know.
        tokenizer = AutoTokenizer.from_pretrained(
            str(model), config=config, trust_remote_code=trust_remote_code
        )
        if tokenizer.is_fast:  # settings in tokenizer.json are for other uses
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _check_ids(file: Path) -> None:
    """Raises ValueError if a vocabulary has ids so large that loading it would take minutes."""
    if not is_file(file):
        return
    content = read_bytes(file)
    if _LARGE.search(content) is None:  # as in most files, of which parsing takes a second
        return
    facts = parse_json(content, plain=False)
    model = facts.get("model") if isinstance(facts, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    large = [number for number in ids if isinstance(number, int) and number >= _IDS]
    if large:
        raise ValueError(f"{file} has the token id {short(max(large))}; ids are below {_IDS}")
