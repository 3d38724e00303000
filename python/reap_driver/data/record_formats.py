"""Formats of records: which fields make token ids, a text, or a conversation with tools.

| fields | content |
|---|---|
| `input_ids` (+ `attention_mask`, `labels`) | token ids, without those of mask 0 |
| `text` | a text |
| `messages` (+ `tools`, `images`) | a conversation |
| `conversations` of `from` and `value` (+ `system`, `tools`, `images`) | a conversation |
| `query`, `answers` (+ `tools`) | a question and the tool calls that answer it |
| `instruction`, `output` (+ `input`, `system`) | a question and its answer |
| `prompt`, `completion` (+ `tools`) | the same, or two lists of messages |
| `content` | a text |

If a record matches several formats, the first in this order is used; a field that is null counts as
absent. Other fields with content are recorded as unused. Lists and objects may be given as JSON
text. A question with its answer becomes a conversation if the tokenizer has a chat template, else a
text: the parts of an instruction separated by empty lines, prompt and completion concatenated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from typing import Any

from reap_driver.compat.library_errors import one_line
from reap_driver.data.image_parts import COLUMNS, take_images
from reap_driver.data.messages import (
    checked_messages,
    checked_tools,
    list_of_objects,
    tool_call,
    turn,
)
from reap_driver.data.records import Record, unused
from reap_kernels.errors import DataError


@dataclass(frozen=True)
class Tokens:
    """Token ids.

    Attributes:
        ids: [n], without those whose `attention_mask` is 0.
        labels: [n], for the same positions; None if the record has none.
    """

    ids: list[int]
    labels: list[int] | None = None


@dataclass(frozen=True)
class Text:
    """A text; `answer` is the index at which its answer begins, None if it has no answer."""

    text: str
    answer: int | None = None


@dataclass(frozen=True)
class Chat:
    """A conversation in the form that chat templates take.

    Attributes:
        messages: objects with `role`, `content` and other fields of the record's messages.
        tools: tools with JSON schemas; None if there are none.
        plain: the conversation as a text, for models without a chat template; None if it has no
            such form.
        images: the images as given, one per placeholder, in order.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    plain: Text | None = None
    images: tuple[Any, ...] = ()


Content = Tokens | Text | Chat


def content_of(record: Record) -> Content:
    """The content of a record, by the first format that it matches.

    Raises:
        DataError: it matches no format, or a field has the wrong type. Names the record's place.
    """
    fields = record.fields
    for needed, more, make in _FORMATS:
        if all(fields.get(name) is not None for name in needed):
            record.unused.update(unused(fields, (*needed, *more)))
            return make(record)
    known = ", ".join(" + ".join(needed) for needed, _, _ in _FORMATS)
    has = ", ".join(sorted(name for name, value in fields.items() if value is not None))
    raise DataError(
        f"{record.place}: has the fields of no known format, which are {known} (it has "
        f"{one_line(has) if has else 'none at all'}); rename its fields"
    )


def _ids(record: Record) -> Tokens:
    ids, labels = _integers(record, "input_ids"), None
    if record.fields.get("labels") is not None:
        labels = _beside(record, "labels", ids)
    if record.fields.get("attention_mask") is None:
        return Tokens(ids, labels)
    mask = _beside(record, "attention_mask", ids)
    if not {0, 1}.issuperset(mask):
        raise DataError(
            f"{record.place}: attention_mask must hold 0 and 1 only; give documents that were "
            "packed together as records of their own"
        )
    return Tokens(
        list(compress(ids, mask)), None if labels is None else list(compress(labels, mask))
    )


def _integers(record: Record, name: str) -> list[int]:
    value = record.fields[name]
    kinds = (int, bool) if name == "attention_mask" else (int,)
    if not isinstance(value, list) or any(type(item) not in kinds for item in value):
        raise DataError(f"{record.place}: {name} must be a flat list of integers")
    return value


def _beside(record: Record, name: str, ids: list[int]) -> list[int]:
    """A field with one number per token id."""
    value = _integers(record, name)
    if len(value) != len(ids):
        raise DataError(
            f"{record.place}: input_ids has {len(ids)} entries and {name} {len(value)}; give "
            "one for each token"
        )
    return value


def _text(name: str) -> Callable[[Record], Text]:
    return lambda record: Text(_string(record, name))


def _messages(record: Record) -> Chat:
    messages = checked_messages(record, "messages")
    return Chat(messages, checked_tools(record), images=take_images(record, messages))


def _conversations(record: Record) -> Chat:
    """Objects with `from` and `value`, as in ShareGPT, or with `role` and `content`."""
    given = list_of_objects(record, "conversations")
    turns = [turn(record, item) if "from" in item else item for item in given]
    messages = _system(record) + checked_messages(record, "conversations", turns)
    return Chat(messages, checked_tools(record), images=take_images(record, messages))


def _query(record: Record) -> Chat:
    given = list_of_objects(record, "answers", least=0)
    calls = [tool_call(record, "answers", call, n) for n, call in enumerate(given)]
    answer = _message("assistant", "") | ({"tool_calls": calls} if calls else {})
    return Chat([_message("user", _string(record, "query")), answer], checked_tools(record))


def _instruction(record: Record) -> Chat:
    asked = [_string(record, name) for name in ("instruction", "input") if record.fields.get(name)]
    question, answer = "\n\n".join(asked), _string(record, "output")
    system = _system(record)
    before = "\n\n".join([*(message["content"] for message in system), question, ""])
    return Chat(
        [*system, _message("user", question), _message("assistant", answer)],
        plain=Text(before + answer, len(before)),
    )


def _prompt(record: Record) -> Chat:
    prompt, completion = record.fields["prompt"], record.fields["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        both = [
            _message(role, value) if isinstance(value, str) else checked_messages(record, name)
            for role, name, value in (
                ("user", "prompt", prompt),
                ("assistant", "completion", completion),
            )
        ]
        messages = [m for part in both for m in (part if isinstance(part, list) else [part])]
        return Chat(messages, checked_tools(record), images=take_images(record, messages))
    prompt, completion = _string(record, "prompt"), _string(record, "completion")
    return Chat(
        [_message("user", prompt), _message("assistant", completion)],
        checked_tools(record),
        Text(prompt + completion, len(prompt)),
    )


def _system(record: Record) -> list[dict[str, Any]]:
    return [_message("system", _string(record, "system"))] if record.fields.get("system") else []


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _string(record: Record, name: str) -> str:
    value = record.fields[name]
    if not isinstance(value, str):
        raise DataError(f"{record.place}: {name} is a {type(value).__name__}; it must be a string")
    return value


# Required fields, optional fields, and the function that makes the content.
_FORMATS: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Record], Content]], ...] = (
    (("input_ids",), ("attention_mask", "labels", "token_type_ids"), _ids),
    (("text",), (), _text("text")),
    (("messages",), ("tools", *COLUMNS), _messages),
    (("conversations",), ("system", "tools", *COLUMNS), _conversations),
    (("query", "answers"), ("tools",), _query),
    (("instruction", "output"), ("input", "system"), _instruction),
    (("prompt", "completion"), ("tools", *COLUMNS), _prompt),
    (("content",), (), _text("content")),
)
FIELDS = frozenset(name for needed, more, _ in _FORMATS for name in (*needed, *more))
