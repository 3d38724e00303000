"""Records to token ids: ids as they are, texts tokenised, conversations by chat template."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from reap_driver.compat.library_errors import wrap_errors
from reap_driver.data.chat import ChatTemplate, Span
from reap_driver.data.compressed_files import LARGEST
from reap_driver.data.image_inputs import ImageEncoder, ImageInputs
from reap_driver.data.images import read_images
from reap_driver.data.record_formats import Chat, Text, Tokens, content_of
from reap_driver.data.records import BadRecords, Record, guard
from reap_driver.data.tokenizer import load_tokenizer
from reap_kernels.errors import DataError
from reap_kernels.schema import short

_INT32 = 2**31  # ids are kept in 32 bits
_NO_LABEL = -100  # what trainers write where a token is none to learn


@dataclass(frozen=True)
class Document:
    """A record as a model reads it.

    Attributes:
        ids: token ids.
        counted: one byte a token, 1 where an answer stands; None where every token counts.
        given: whether these ids stay as they are, in a sequence without others' tokens added: the
            record had them, or a processor made them.
        image_inputs: with its images, what a model is given instead of the ids alone.
    """

    ids: list[int]
    counted: bytes | None = None
    given: bool = False
    image_inputs: ImageInputs | None = None


@dataclass
class _Texts:
    """Texts to be tokenised together, by number of record; where in them answers stand."""

    texts: dict[int, str] = field(default_factory=dict)
    answers: dict[int, list[Span]] = field(default_factory=dict)


class Encoder:
    """Turns records into token ids of one model, checked against its vocabulary.

    Args:
        model: folder or hub id, for the tokenizer; it is loaded when a record first needs it.
        config: of the model.
        trust_remote_code: allow a tokenizer's own code.
        enable_thinking: for chat templates that know it; None leaves their own default.
        answers_only: say which tokens are answers: what the assistant says in conversations, or the
            answer to an instruction or prompt. Of records without any, an error.

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
        self._enable_thinking = enable_thinking
        self._answers_only = answers_only
        self._tokenizer: Any = None
        self._fits = False  # whether all ids of the tokenizer are in the vocabulary
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
        """Id put between documents; config.json's end-of-sequence id, else the tokenizer's.

        Raises:
            DataError: it is outside the vocabulary.
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
        """Names of fields of records that the chat template was seen to write."""
        return frozenset() if self._template is None else frozenset(self._template.written)

    def encode(
        self, records: Sequence[Record], bad: BadRecords | None = None
    ) -> Iterator[Document]:
        """Token ids of each record, in order. Texts are tokenised together, which is faster.

        Args:
            records: read together; some hundreds keep a tokenizer's threads busy.
            bad: takes what is wrong with records, which are left out; None raises it.

        Raises:
            DataError: a record of no known shape, with a field of the wrong type, an id outside the
                vocabulary, or a conversation its chat template refuses, by place; or the model has
                no tokenizer or chat template for it.
        """
        done: dict[int, Document] = {}
        plain, rendered = _Texts(), _Texts()  # the latter have their special tokens already
        left_out = guard(bad)
        for index, record in enumerate(records):
            shape = None
            with left_out:
                shape = content_of(record)
            if isinstance(shape, Chat) and not self._has_template(record, shape):
                record.unused.update(["tools"] if shape.tools else [])
                shape = shape.plain
            elif isinstance(shape, Text):
                self._load_tokenizer(record)
            with left_out:
                if isinstance(shape, Tokens):
                    self._check_vocabulary(record, shape.ids)
                    done[index] = Document(shape.ids, self._labelled(record, shape), given=True)
                elif isinstance(shape, Text):
                    self._add_text(plain, index, record, shape)
                elif isinstance(shape, Chat):
                    self._add_chat(rendered, done, index, record, shape)
        for special, group in ((True, plain), (False, rendered)):
            done |= self._tokenised(records, group, special, left_out)
        kept = []
        for index in sorted(done):
            with left_out:
                if not self._fits:
                    self._check_vocabulary(records[index], done[index].ids)
                kept.append(done[index])
        yield from kept

    def _add_text(self, group: _Texts, index: int, record: Record, shape: Text) -> None:
        if self._answers_only and shape.answer is None:
            raise _no_answer(record, "is a text")
        _check_text(record, shape.text)
        group.texts[index] = shape.text
        group.answers[index] = [(shape.answer or 0, len(shape.text))]

    def _add_chat(
        self, group: _Texts, done: dict[int, Document], index: int, record: Record, shape: Chat
    ) -> None:
        template, place = self._template, record.place
        assert template is not None
        if shape.images:
            done[index] = self._with_images(template, record, shape)
        elif not self._answers_only:
            group.texts[index] = template.render(place, shape)
        elif not any(message["role"] == "assistant" for message in shape.messages):
            raise _no_answer(record, "is a conversation in which no assistant speaks")
        elif template.marks_answers(place, shape):
            done[index] = Document(*template.marked(place, shape))
        else:
            group.texts[index], group.answers[index] = template.answers(place, shape)
        if index in group.texts:
            _check_text(record, group.texts[index])
        record.unused.update(template.unwritten(place, shape))

    def _with_images(self, template: ChatTemplate, record: Record, shape: Chat) -> Document:
        """A conversation as the model's processor makes it."""
        if self._answers_only:
            raise DataError(
                f"{record.place}: has images, whose tokens the processor puts in, so that answers "
                "cannot be told apart; leave out --answers-only, or such records"
            )
        text = template.render(record.place, shape)
        _check_text(record, text)
        images = read_images(record, shape.images)
        image_inputs, ids = self._image_encoder.of(record.place, text, images, self._tokenizer)
        return Document(ids, given=True, image_inputs=image_inputs)

    def _tokenised(
        self,
        records: Sequence[Record],
        group: _Texts,
        special: bool,
        left_out: AbstractContextManager[None],
    ) -> dict[int, Document]:
        """The documents of a group, by number of record; one by one where a tokenizer fails."""
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
        # Without offsets, which are a fifth of the time of the tokenizer's own call.
        found = backend.encode_batch_fast(texts, add_special_tokens=special)
        return [Document(one.ids) for one in found]

    def _has_template(self, record: Record, shape: Chat) -> bool:
        """Loads the tokenizer; whether it has a chat template, which most conversations need."""
        tokenizer = self._load_tokenizer(record)
        if getattr(tokenizer, "chat_template", None):
            if self._template is None:
                self._template = ChatTemplate(tokenizer, str(self._model), self._enable_thinking)
            return True
        if shape.plain is None:
            raise DataError(
                f"{record.place}: is a conversation, but the tokenizer of {self._model} has no "
                "chat template; add chat_template.jinja to the model's folder, or give records "
                "with text"
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
                    f"the tokenizer of {self._model} does not say which characters its tokens "
                    "stand for, which answers are found by; add a tokenizer.json, or count all "
                    "tokens"
                )
            self._fits = max(self._tokenizer.get_vocab().values(), default=0) < self._size
        return self._tokenizer

    def _labelled(self, record: Record, shape: Tokens) -> bytes | None:
        """A byte a token, 1 where it has a label; None where all tokens count."""
        if not self._answers_only:
            return None
        if shape.labels is None:
            raise _no_answer(record, "has token ids without labels")
        for at, (token, label) in enumerate(zip(shape.ids, shape.labels, strict=True)):
            if label not in (token, _NO_LABEL):
                raise DataError(
                    f"{record.place}: its token {at} is {short(token)} and has the label "
                    f"{short(label)}; give labels that are not shifted: the token itself, or "
                    f"{_NO_LABEL}"
                )
        return bytes(label != _NO_LABEL for label in shape.labels)

    def _check_vocabulary(self, record: Record, ids: list[int]) -> None:
        if not ids:
            return
        low, high = min(ids), max(ids)
        if low < 0 or high >= self._size:
            raise DataError(
                f"{record.place}: token id {short(low if low < 0 else high)} is outside the "
                f"vocabulary of {self._model} ({self._size} tokens); tokenise with this model's "
                "tokenizer"
            )


def _mask(offsets: list[Span], answers: list[Span]) -> bytes:
    """A byte a token: 1 where any of its characters stands in an answer."""
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
            "which no encoding writes; correct it"
        ) from error


def _no_answer(record: Record, why: str) -> DataError:
    return DataError(
        f"{record.place}: {why}, so it has no answer to count; give records with an assistant's "
        "turns, instruction + output, prompt + completion or labels, or count all tokens"
    )
