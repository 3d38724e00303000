"""Formats of records: which fields make token ids, a text, or a conversation with tools.

`FORMATS` lists them. If a record matches several, the first in this order is used, and the others'
fields are recorded as unused, as are other fields with content; a field that is null counts as
absent. Lists and objects may be given as JSON text. A question with its answer becomes a
conversation if the tokenizer has a chat template, else a text: its parts separated by empty lines,
prompt and completion concatenated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from reap_driver.compat.library_errors import one_line
from reap_driver.data.image_parts import COLUMNS, take_images
from reap_driver.data.messages import (
    checked_messages,
    checked_tools,
    list_of_objects,
    parsed,
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
    for one in FORMATS:
        if all(fields.get(name) is not None for name in one.needed):
            record.unused.update(unused(fields, (*one.needed, *one.more)))
            return one.make(record)
    has = [name for name, value in fields.items() if value is not None]
    lists = [name for name in has if _lists_records(fields[name])]
    remedy = (
        f"if its records are those in {one_line(lists[0])}, give that list as the file"
        if len(lists) == 1
        else "rename its fields"
    )
    raise DataError(
        f"{record.place}: has the fields of no known format, which are {known_formats()} (it has "
        f"{one_line(', '.join(sorted(has))) if has else 'none at all'}); {remedy}"
    )


def known_formats() -> str:
    """The fields that formats need, for error messages."""
    return ", ".join(" + ".join(one.needed) for one in FORMATS)


def _lists_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


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
    value = parsed(record, name, record.fields[name])
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


def _conversation(name: str) -> Callable[[Record], Chat]:
    """Objects with `from` and `value`, as in ShareGPT, or with `role` and `content`."""

    def make(record: Record) -> Chat:
        given = list_of_objects(record, name)
        turns = [turn(record, item) if "from" in item else item for item in given]
        messages = _system(record) + checked_messages(record, name, turns)
        return Chat(messages, checked_tools(record), images=take_images(record, messages))

    return make


def _query(record: Record) -> Chat:
    given = list_of_objects(record, "answers", least=0)
    calls = [tool_call(record, "answers", call, n) for n, call in enumerate(given)]
    answer = _message("assistant", "") | ({"tool_calls": calls} if calls else {})
    return Chat([_message("user", _string(record, "query")), answer], checked_tools(record))


def _pair(asked: str, answered: str, context: str = "") -> Callable[[Record], Chat]:
    """A question, perhaps with a context, and its answer, by the names of their fields."""

    def make(record: Record) -> Chat:
        names = [name for name in (asked, context) if record.fields.get(name)]
        return _exchange(
            record,
            "\n\n".join(_string(record, name) for name in names),
            _string(record, answered),
        )

    return make


def _exchange(record: Record, question: str, answer: str) -> Chat:
    """A question and its answer, after the record's system message."""
    system = _system(record)
    before = "\n\n".join([*(message["content"] for message in system), question, ""])
    return Chat(
        [*system, _message("user", question), _message("assistant", answer)],
        plain=Text(before + answer, len(before)),
    )


def _chosen(record: Record) -> Content:
    """The preferred answer of preference data: to `prompt` or `question`, or a whole conversation
    if it is a list that does not begin with the assistant, or a text where there is no prompt.
    """
    fields = record.fields
    name = next((name for name in ("prompt", "question") if fields.get(name) is not None), None)
    prompt = None if name is None else fields[name]
    if not isinstance(fields["chosen"], list):
        answer = _string(record, "chosen")
        if name is None:
            return Text(answer)
        if not isinstance(prompt, list):
            found = _exchange(record, _string(record, name), answer)
            return replace(found, tools=checked_tools(record))
        answers = [_message("assistant", answer)]
    else:
        answers = checked_messages(record, "chosen")
    before: list[dict[str, Any]] = []
    if name is not None and answers[0]["role"] == "assistant":
        whole = isinstance(prompt, list)
        before = (
            checked_messages(record, name) if whole else [_message("user", _string(record, name))]
        )
    messages = [*before, *answers]
    if messages[0]["role"] != "system":
        messages = [*_system(record), *messages]
    return Chat(messages, checked_tools(record), images=take_images(record, messages))


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
    name = next((name for name in SYSTEM if record.fields.get(name)), None)
    return [] if name is None else [_message("system", _string(record, name))]


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _string(record: Record, name: str) -> str:
    value = record.fields[name]
    if not isinstance(value, str):
        raise DataError(f"{record.place}: {name} is a {type(value).__name__}; it must be a string")
    return value


@dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
        needed: fields that it is recognized by.
        more: fields that are used if they are there.
        make: makes the content of a record.
        becomes: what it becomes, for the documentation.
    """

    needed: tuple[str, ...]
    more: tuple[str, ...]
    make: Callable[[Record], Content]
    becomes: str


SYSTEM = ("system", "system_prompt")
_TURNS = "a conversation of `from` and `value`, as ShareGPT's, or of `role` and `content`"
_EXCHANGE = "a question and its answer"
_TALK = ("tools", *COLUMNS)
# In order of precedence.
FORMATS = (
    Format(
        ("input_ids",),
        ("attention_mask", "labels", "token_type_ids"),
        _ids,
        "these token ids, except those whose mask is 0; no separator is added, and a full "
        "sequence stays one",
    ),
    Format(("text",), (), _text("text"), "a text"),
    Format(("messages",), _TALK, _messages, "a conversation of `role` and `content`"),
    Format(("conversations",), (*SYSTEM, *_TALK), _conversation("conversations"), _TURNS),
    Format(("conversation",), (*SYSTEM, *_TALK), _conversation("conversation"), _TURNS),
    Format(("query", "answers"), ("tools",), _query, "a question and the tool calls that answer"),
    Format(
        ("instruction", "output"),
        ("input", *SYSTEM),
        _pair("instruction", "output", "input"),
        _EXCHANGE,
    ),
    Format(
        ("instruction", "response"),
        ("context", *SYSTEM),
        _pair("instruction", "response", "context"),
        _EXCHANGE,
    ),
    Format(("problem", "solution"), SYSTEM, _pair("problem", "solution"), _EXCHANGE),
    Format(("question", "answer"), SYSTEM, _pair("question", "answer"), _EXCHANGE),
    Format(("question", "response"), SYSTEM, _pair("question", "response"), _EXCHANGE),
    Format(
        ("prompt", "completion"), _TALK, _prompt, f"{_EXCHANGE}, as texts or as lists of messages"
    ),
    Format(("prompt", "response"), SYSTEM, _pair("prompt", "response"), _EXCHANGE),
    Format(
        ("chosen",),
        ("prompt", "question", *SYSTEM, *_TALK),
        _chosen,
        "the preferred answer, as a text or messages, after its prompt; `rejected` is not used",
    ),
    Format(("content",), (), _text("content"), "a text"),
    Format(("code",), (), _text("code"), "a text"),
)
FIELDS = frozenset(name for one in FORMATS for name in (*one.needed, *one.more))
