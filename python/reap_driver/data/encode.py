"""Converts records to token ids, with the model's tokenizer, chat template and image processor."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from reap_driver.compat.chat_rendering import Span
from reap_driver.compat.library_errors import wrap_errors
from reap_driver.data.chat import EVERY_KIND, ChatTemplate
from reap_driver.data.compressed_files import LARGEST
from reap_driver.data.image_inputs import ImageEncoder, ImageInputs
from reap_driver.data.images import read_images
from reap_driver.data.record_formats import Chat, Content, Text, Tokens, content_of
from reap_driver.data.records import BadRecords, Record, guard
from reap_driver.data.template_file import TemplateFile
from reap_driver.data.tokenizer import load_tokenizer
from reap_kernels.errors import DataError
from reap_kernels.schema import short

_INT32 = 2**31  # ids are stored as int32
_NO_LABEL = -100  # label of tokens that do not count in a training loss


@dataclass(frozen=True)
class Document:
    """A record as token ids.

    Attributes:
        ids: token ids.
        counted: one byte per token, 1 if it belongs to an answer; None if every token counts.
        given: whether the ids come from the record or from an image processor, so that no separator
            may be added to them.
        image_inputs: for a record with images, makes the model's inputs.
    """

    ids: list[int]
    counted: bytes | None = None
    given: bool = False
    image_inputs: ImageInputs | None = None


@dataclass
class _Texts:
    """Texts to tokenize at once, and the spans of answers in them, by index of the record."""

    texts: dict[int, str] = field(default_factory=dict)
    answers: dict[int, list[Span]] = field(default_factory=dict)


class Encoder:
    """Converts records to token ids of one model, checked against its vocabulary.

    Args:
        model: folder or hub id of the tokenizer, which is loaded when a record first needs it.
        config: configuration of the model.
        trust_remote_code: run code that comes with a tokenizer.
        enable_thinking: passed to the chat template; None for the template's own default.
        answers_only: mark the tokens of answers: the assistant's turns in conversations, and the
            answers to instructions and prompts. Records without an answer are an error.
        chat_template: used instead of the tokenizer's.

    Attributes:
        vocab_size: ids must be below it; None if the configuration does not have it.
        chat_template: as given.
    """

    def __init__(
        self,
        model: str | Path,
        config: PretrainedConfig,
        *,
        trust_remote_code: bool = False,
        enable_thinking: bool | None = None,
        answers_only: bool = False,
        chat_template: TemplateFile | None = None,
    ) -> None:
        self._model = model
        self._config = config
        self._trust = trust_remote_code
        self._enable_thinking = enable_thinking
        self._answers_only = answers_only
        self.chat_template = chat_template
        self._tokenizer: Any = None
        self._fits = False  # whether the model has an embedding for every id of the tokenizer
        self._template: ChatTemplate | None = None
        self._image_encoder = ImageEncoder(model, config, trust_remote_code=trust_remote_code)
        text = config.get_text_config()
        size = getattr(text, "vocab_size", None)
        self.vocab_size: int | None = size if isinstance(size, int) else None
        self._size = min(self.vocab_size or _INT32, _INT32)
        eos = getattr(text, "eos_token_id", None)
        eos = getattr(config, "eos_token_id", None) if eos is None else eos
        first = eos[0] if isinstance(eos, list) and eos else eos
        self._eos: int | None = first if isinstance(first, int) else None

    @property
    def separator(self) -> int | None:
        """Token id between documents: the end-of-sequence id of config.json, else the tokenizer's.

        Raises:
            DataError: the id is outside the vocabulary.
        """
        if self._eos is None and self._tokenizer is not None:
            self._eos = self._tokenizer.eos_token_id
        if self._eos is not None and not 0 <= self._eos < self._size:
            raise DataError(
                f"{self._model}: its end-of-sequence token {short(self._eos)} is outside its "
                f"vocabulary ({self._size} tokens); correct eos_token_id in config.json"
            )
        return self._eos

    @property
    def written(self) -> frozenset[str]:
        """Names of fields of records that the chat template has written."""
        return frozenset() if self._template is None else frozenset(self._template.written)

    def check_template(self, record: Record, *, only_plain: bool = False) -> None:
        """Checks that the chat template can render conversations of a record's kind.

        Args:
            record: a record; nothing is checked if it is malformed or no conversation.
            only_plain: check a question and an answer only, and not what the record has besides.

        Raises:
            DataError: there is no template, or it fails; names the record.
        """
        content: Content | None = None
        with suppress(DataError):  # reading the data reports malformed records
            content = content_of(record)
        if isinstance(content, Chat) and self._has_template(record, content):
            assert self._template is not None
            self._template.check(record.place, content, only_plain=only_plain)

    def renders_all(self, place: str) -> bool:
        """Whether the chat template can render every kind of conversation."""
        probe = Record(place, {"messages": [{"role": "user", "content": "probe"}]})
        with suppress(DataError):
            self.check_template(probe)
            assert self._template is not None
            self._template.check(place, EVERY_KIND)
            return True
        return False

    def encode(
        self, records: Sequence[Record], bad: BadRecords | None = None
    ) -> Iterator[Document]:
        """Token ids of each record, in order.

        Args:
            records: tokenized in one call; a few hundred keep a tokenizer's threads busy.
            bad: collects the errors of bad records, which are skipped; if None, errors are raised.

        Raises:
            DataError: a record has no known format, a field of the wrong type or an id outside the
                vocabulary, or the chat template refuses it, with the record's place; or the model
                has no tokenizer or chat template.
        """
        done: dict[int, Document] = {}
        plain, rendered = _Texts(), _Texts()  # rendered texts include their special tokens
        left_out = guard(bad)
        for index, record in enumerate(records):
            content = None
            with left_out:
                content = content_of(record)
            if isinstance(content, Chat) and not self._has_template(record, content):
                record.unused.update(["tools"] if content.tools else [])
                content = content.plain
            elif isinstance(content, Text):
                self._load_tokenizer(record)
            with left_out:
                if isinstance(content, Tokens):
                    self._check_vocabulary(record, content.ids)
                    done[index] = Document(content.ids, self._labeled(record, content), given=True)
                elif isinstance(content, Text):
                    self._add_text(plain, index, record, content)
                elif isinstance(content, Chat):
                    self._add_chat(rendered, done, index, record, content)
        for special, group in ((True, plain), (False, rendered)):
            done |= self._tokenized(records, group, special, left_out)
        kept = []
        for index in sorted(done):
            with left_out:
                if not self._fits:
                    self._check_vocabulary(records[index], done[index].ids)
                kept.append(done[index])
        yield from kept

    def _add_text(self, group: _Texts, index: int, record: Record, content: Text) -> None:
        if self._answers_only and content.answer is None:
            raise _no_answer(record, "is a text")
        _check_text(record, content.text)
        group.texts[index] = content.text
        group.answers[index] = [(content.answer or 0, len(content.text))]

    def _add_chat(
        self, group: _Texts, done: dict[int, Document], index: int, record: Record, content: Chat
    ) -> None:
        template, place = self._template, record.place
        assert template is not None
        if content.images:
            done[index] = self._with_images(template, record, content)
        elif not self._answers_only:
            group.texts[index] = template.render(place, content)
        elif not any(message["role"] == "assistant" for message in content.messages):
            raise _no_answer(record, "is a conversation in which no assistant speaks")
        elif template.marks_answers(place, content):
            group.texts[index], group.answers[index] = template.marked(place, content)
        else:
            group.texts[index], group.answers[index] = template.answers(place, content)
        if index in group.texts:
            _check_text(record, group.texts[index])
        record.unused.update(template.unwritten(place, content))

    def _with_images(self, template: ChatTemplate, record: Record, content: Chat) -> Document:
        """A conversation with images, tokenized by the model's processor."""
        if self._answers_only:
            raise DataError(
                f"{record.place}: has images, whose tokens the processor inserts, so its answers "
                "cannot be located; leave out `answers_only=True`, or such records"
            )
        text = template.render(record.place, content)
        _check_text(record, text)
        images = read_images(record, content.images)
        image_inputs, ids = self._image_encoder.of(record.place, text, images, self._tokenizer)
        return Document(ids, given=True, image_inputs=image_inputs)

    def _tokenized(
        self,
        records: Sequence[Record],
        group: _Texts,
        special: bool,
        left_out: AbstractContextManager[None],
    ) -> dict[int, Document]:
        """The documents of a group, by index of the record; one by one if tokenizing all at
        once fails.
        """
        indices = list(group.texts)
        with suppress(DataError), wrap_errors("texts", "see below", error=DataError):
            return dict(zip(indices, self._documents(group, indices, special), strict=True))
        done = {}
        for index in indices:
            with left_out:
                done[index] = self._alone(records[index], group, index, special)
        return done

    def _alone(self, record: Record, group: _Texts, index: int, special: bool) -> Document:
        fails = f"{record.place}: the tokenizer of {self._model} fails on its text"
        with wrap_errors(fails, "correct the text or the tokenizer", error=DataError):
            [document] = self._documents(group, [index], special)
        return document

    def _documents(self, group: _Texts, indices: list[int], special: bool) -> list[Document]:
        texts = [group.texts[index] for index in indices]
        if not texts:
            return []
        if not self._tokenizer.is_fast:
            call = self._tokenizer(texts, add_special_tokens=special, verbose=False)
            return [Document(ids) for ids in call["input_ids"]]
        backend = self._tokenizer.backend_tokenizer
        if self._answers_only:
            found = backend.encode_batch(texts, add_special_tokens=special)
            pairs = zip(found, (group.answers[index] for index in indices), strict=True)
            return [Document(one.ids, _mask(one.offsets, answers)) for one, answers in pairs]
        # Computes no offsets, which would take a fifth of the time of the call.
        found = backend.encode_batch_fast(texts, add_special_tokens=special)
        return [Document(one.ids) for one in found]

    def _has_template(self, record: Record, content: Chat) -> bool:
        """Loads the tokenizer; returns whether it has a chat template, which most
        conversations need.
        """
        tokenizer = self._load_tokenizer(record)
        if getattr(tokenizer, "chat_template", None):
            if self._template is None:
                given = self.chat_template
                name = f"of {self._model}" if given is None else given.path
                self._template = ChatTemplate(tokenizer, name, self._enable_thinking)
            return True
        if content.plain is None:
            raise DataError(
                f"{record.place}: is a conversation, but the tokenizer of {self._model} has no "
                "chat template; give one with `chat_template`, such as that of the model's "
                "instruction-tuned version, or records with text"
            )
        return False

    def _load_tokenizer(self, record: Record) -> Any:
        if self._tokenizer is None:
            what = f"{record.place}: needs the tokenizer of {self._model}"
            self._tokenizer = load_tokenizer(
                self._model, self._config, what, trust_remote_code=self._trust
            )
            if self._answers_only and not self._tokenizer.is_fast:
                raise DataError(
                    f"the tokenizer of {self._model} does not give the character offsets of "
                    "tokens, which are needed to find answers; add a tokenizer.json, or count all "
                    "tokens"
                )
            if self.chat_template is not None:
                self._tokenizer.chat_template = self.chat_template.template
            self._fits = max(self._tokenizer.get_vocab().values(), default=0) < self._size
        return self._tokenizer

    def _labeled(self, record: Record, content: Tokens) -> bytes | None:
        """One byte per token, 1 if it has a label; None if all tokens count."""
        if not self._answers_only:
            return None
        if content.labels is None:
            raise _no_answer(record, "has token ids without labels")
        for at, (token, label) in enumerate(zip(content.ids, content.labels, strict=True)):
            if label not in (token, _NO_LABEL):
                raise DataError(
                    f"{record.place}: its token {at} is {short(token)} and has the label "
                    f"{short(label)}; give labels that are not shifted: the token itself, or "
                    f"{_NO_LABEL}"
                )
        return bytes(label != _NO_LABEL for label in content.labels)

    def _check_vocabulary(self, record: Record, ids: list[int]) -> None:
        if not ids:
            return
        low, high = min(ids), max(ids)
        if low < 0 or high >= self._size:
            raise DataError(
                f"{record.place}: token id {short(low if low < 0 else high)} is outside the "
                f"vocabulary of {self._model} ({self._size} tokens); tokenize with this model's "
                "tokenizer"
            )


def _mask(offsets: list[Span], answers: list[Span]) -> bytes:
    """One byte per token: 1 if any of its characters is in an answer."""
    first, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    counted = np.zeros(len(offsets), dtype=bool)
    for begin, stop in answers:
        counted |= (first < stop) & (end > begin) & (end > first)
    return counted.tobytes()


def _check_text(record: Record, text: str) -> None:
    if len(text) > LARGEST:
        raise DataError(
            f"{record.place}: its text has {len(text)} characters, more than {LARGEST}; divide it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{record.place}: its text has half of a surrogate pair as character {error.start}, "
            "which cannot be encoded; correct it"
        ) from error


def _no_answer(record: Record, why: str) -> DataError:
    return DataError(
        f"{record.place}: {why}, so it has no answer to count; give records with an assistant's "
        "turns, instruction + output, prompt + completion or labels, or count all tokens"
    )
