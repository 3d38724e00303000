"""Records to token ids: `input_ids` as they are, `text` tokenised, `messages` by chat template.

Of several fields in one record the first in that order counts.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from reap_driver.calibration.records import BadRecords, Record
from reap_kernels.errors import DataError

FIELDS = ("input_ids", "text", "messages")


@dataclass(frozen=True)
class Document:
    """A record as a model reads it.

    Attributes:
        ids: token ids.
        counted: one byte a token, 1 where an answer stands; None where every token counts.
    """

    ids: list[int]
    counted: bytes | None = None


class Encoder:
    """Turns records into token ids of one model, checked against its vocabulary.

    Args:
        model: folder or hub id, for the tokenizer; it is loaded when a record first needs it.
        config: of the model.
        trust_remote_code: allow a tokenizer's own code.

    Attributes:
        vocab_size: ids must be below it; None where the config does not say.
    """

    def __init__(
        self,
        model: str | Path,
        config: PretrainedConfig,
        *,
        trust_remote_code: bool = False,
        enable_thinking: bool | None = None,
        answers_only: bool = False,
    ) -> None:
        self._model = model
        self._config = config
        self._trust = trust_remote_code
        self._tokenizer: Any = None
        text = config.get_text_config()
        size = getattr(text, "vocab_size", None)
        self.vocab_size: int | None = size if isinstance(size, int) else None
        eos = getattr(text, "eos_token_id", None)
        eos = getattr(config, "eos_token_id", None) if eos is None else eos
        first = eos[0] if isinstance(eos, list) and eos else eos
        self._eos: int | None = first if isinstance(first, int) else None

    @property
    def separator(self) -> int | None:
        """Id put between documents; config.json's end-of-sequence id, else the tokenizer's."""
        if self._eos is None and self._tokenizer is not None:
            self._eos = self._tokenizer.eos_token_id
        return self._eos

    def encode(
        self, records: Sequence[Record], bad: BadRecords | None = None
    ) -> Iterator[Document]:
        """Token ids of each record, in order. Texts are tokenised together, which is faster.

        Raises:
            DataError: a record without a known field, of the wrong type, or with an id outside the
                vocabulary; or the model has no tokenizer or chat template for it. Names the place.
        """
        ids: dict[int, list[int]] = {}
        texts: dict[bool, dict[int, str]] = {True: {}, False: {}}
        for index, record in enumerate(records):
            name = next((f for f in FIELDS if record.fields.get(f) is not None), None)
            if name is None:
                raise DataError(
                    f"{record.place}: has none of the fields {', '.join(FIELDS)} (it has "
                    f"{', '.join(sorted(record.fields)) or 'none at all'}); rename its field"
                )
            if name == "input_ids":
                ids[index] = _checked_ids(record)
            elif name == "text":
                texts[True][index] = _checked_text(record)
            else:  # a template writes the special tokens itself
                texts[False][index] = self._render(record)
        for special, wanted in texts.items():
            if wanted:
                found = self._load_tokenizer(records[next(iter(wanted))])(
                    list(wanted.values()), add_special_tokens=special, verbose=False
                )["input_ids"]
                ids.update(zip(wanted, found, strict=True))
        for index, record in enumerate(records):
            self._check_vocabulary(record, ids[index])
            yield Document(ids[index])

    def _load_tokenizer(self, record: Record) -> Any:
        if self._tokenizer is None:
            try:
                # Given the config, AutoTokenizer need not resolve a model_type it does not know.
                self._tokenizer = AutoTokenizer.from_pretrained(
                    str(self._model), config=self._config, trust_remote_code=self._trust
                )
            except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise DataError(
                    f"{record.place}: needs the tokenizer of {self._model}, which cannot be loaded "
                    f"({reason}); add its files (tokenizer.json, ...), allow its code with "
                    "--trust-remote-code, or give records with input_ids"
                ) from error
        return self._tokenizer

    def _render(self, record: Record) -> str:
        """A conversation as the model's chat template writes it."""
        from jinja2 import TemplateError

        messages = _checked_messages(record, "messages")
        tools = _checked_messages(record, "tools") if record.fields.get("tools") else None
        tokenizer = self._load_tokenizer(record)
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{record.place}: has messages, but the tokenizer of {self._model} has no chat "
                "template; add chat_template.jinja to the model's folder, or give records with text"
            )
        try:
            return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"{record.place}: the chat template of {self._model} refuses the messages "
                f"({error}); correct the roles and contents"
            ) from error

    def _check_vocabulary(self, record: Record, ids: list[int]) -> None:
        if not ids:
            return
        low, high = min(ids), max(ids)
        size = self.vocab_size or 2**31
        if low < 0 or high >= size:
            raise DataError(
                f"{record.place}: token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self._model} ({size} tokens); tokenise with this model's tokenizer"
            )


def _checked_ids(record: Record) -> list[int]:
    ids = record.fields["input_ids"]
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise DataError(f"{record.place}: input_ids must be a flat list of integers")
    return ids


def _checked_text(record: Record) -> str:
    text = record.fields["text"]
    if not isinstance(text, str):
        raise DataError(f"{record.place}: text is a {type(text).__name__}; it must be a string")
    return text


def _checked_messages(record: Record, name: str) -> list[dict[str, Any]]:
    """A list of objects, given as such or as JSON text; Parquet's empty fields are left out."""
    value = record.fields[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{record.place}: {name} is text but not JSON ({error})") from error
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{record.place}: {name} must be a list of objects, at least one")
    return [{key: item for key, item in m.items() if item is not None} for m in value]
