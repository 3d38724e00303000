"""Renders conversations with a model's chat template, and locates the assistant's turns in them."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from types import FrameType
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError

from reap_driver.compat.chat_rendering import Span, render, render_marked
from reap_driver.compat.library_errors import is_fault, one_line
from reap_driver.data.record_formats import Chat
from reap_driver.data.records import unused
from reap_kernels.errors import DataError

# Forms of messages with tool calls: the type of arguments (object or JSON text) and the content if
# it is empty (a text or null). transformers documents the first; DeepSeek-V3's templates take
# others.
_FORMS = ((dict, ""), (str, ""), (str, None))
# A question and an answer that no template has of its own.
_WORDS = {"question": "Probe 4711?", "answer": "Probed 4712."}
# Kinds of conversations that a template may refuse, and examples of them.
_PLAIN = "conversations"
_SYSTEM = "conversations with a system message"
_TOOLS = "conversations with tools"
_TOOL = [{"type": "function", "function": {"name": "probe", "description": "A probe."}}]
_CALL = {"name": "probe", "arguments": {"argument": "probed"}}
_CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "probe"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00000", "type": "function", "function": _CALL}],
    },
]
EVERY_KIND = Chat([{"role": "system", "content": "rules"}, *_CALLING], _TOOL)

# After this many records with a field, a field that the template never wrote counts as unused.
_TRIALS = 64

# Lines of a template that may run for one conversation. Real templates run about ten per message.
STEP_LIMIT = 10_000_000
_TEMPLATE_FILE = "<template>"  # file name that Jinja gives to the code of a template


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: the tokenizer of the model.
        name: what error messages call it: `of` and the model, or a file.
        enable_thinking: passed to the template; None for the template's own default.

    Attributes:
        written: names of the fields other than role, content and tool calls that the template has
            written, as `unwritten` names them.
    """

    def __init__(self, tokenizer: Any, name: str, enable_thinking: bool | None) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._trials: Counter[str] = Counter()
        self._faults: dict[str, str] = {}
        self.written: set[str] = set()

    def check(self, place: str, chat: Chat, *, only_plain: bool = False) -> None:
        """Checks that the template renders conversations of this kind: a question and its answer,
        and whatever else the conversation has of a system message, tools and tool calls.

        Args:
            place: place of the record, for error messages.
            chat: the conversation.
            only_plain: check the question and its answer only.

        Raises:
            DataError: it does not; names what it cannot render, and why.
        """
        kinds = [_PLAIN]
        if not only_plain:
            roles = {message["role"] for message in chat.messages}
            kinds += [_SYSTEM] * ("system" in roles) + [_TOOLS] * bool(chat.tools)
        for kind in kinds:
            if kind not in self._faults:
                self._faults[kind] = self._fault(kind)
            if self._faults[kind]:
                raise DataError(
                    f"{place}: the chat template {self._name} cannot be used for {kind} "
                    f"({self._faults[kind]}); correct it, or give another with `chat_template`"
                )
        if not only_plain:
            self._formed(place, chat)

    def _fault(self, kind: str) -> str:
        """What is wrong when a kind of conversation is rendered; empty if nothing is."""
        messages = [
            {"role": "user", "content": _WORDS["question"]},
            {"role": "assistant", "content": _WORDS["answer"]},
        ]
        if kind == _SYSTEM:
            messages.insert(0, {"role": "system", "content": "rules"})
        try:
            with limited_steps():
                text = render(
                    self._tokenizer, messages, _TOOL if kind == _TOOLS else None, **self._options
                )
        except BaseException as error:  # a template can raise anything
            if not is_fault(error):
                raise
            return _reason(error)
        missing = [what for what, word in _WORDS.items() if word not in text]
        return f"it does not write the {' and the '.join(missing)}" if missing else ""

    def render(self, place: str, chat: Chat) -> str:
        """The conversation as text, special tokens included.

        Args:
            place: place of the record, for error messages.
            chat: the conversation.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._render(place, chat, self._formed(place, chat))

    def unwritten(self, place: str, chat: Chat) -> set[str]:
        """Names of the parts of a conversation that the template does not write.

        Parts are `tools`, all messages of a role, named for example `messages of role tool`, and
        fields of messages, named for example `messages[].reasoning_content`. A part is written if
        the text changes without it; this is tested on the first records that have the part.
        """
        found = {"tools": replace(chat, tools=None)} if chat.tools else {}
        for message in chat.messages:
            role = message["role"]
            if message.get("content") or message.get("tool_calls"):
                found.setdefault(f"messages of role {role}", _without_role(chat, role))
            for name in unused(message, ("role", "content", "tool_calls")):
                found.setdefault(f"messages[].{name}", _without(chat, name))
        return {name for name, less in found.items() if not self._writes(name, place, chat, less)}

    def _writes(self, name: str, place: str, chat: Chat, less: Chat) -> bool:
        if name not in self.written and self._trials[name] < _TRIALS:
            self._trials[name] += 1
            try:
                same = self.render(place, chat) == self.render(place, less)
            except DataError:  # the template needs it
                same = False
            if not same:
                self.written.add(name)
        return name in self.written

    def marks_answers(self, place: str, chat: Chat) -> bool:
        """Whether the template marks what the model generates, by `{% generation %}`.

        Raises:
            DataError: the tokenizer has several templates, none of which is the default.
        """
        try:
            template = self._tokenizer.get_chat_template(None, chat.tools)
        except ValueError as error:
            raise self._refused(place, error) from error
        return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def marked(self, place: str, chat: Chat) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans [start, end) that the template marks as
        generated.

        Raises:
            DataError: the template refuses the conversation.
        """
        messages = self._formed(place, chat)
        with self._guarded(place):
            return render_marked(self._tokenizer, messages, chat.tools, **self._options)

    def answers(self, place: str, chat: Chat) -> tuple[str, list[Span]]:
        """The conversation as text, and the span [start, end) of each turn of the assistant.

        A turn starts where the rendering of the messages before it, with the generation prompt,
        ends, or differs from the whole text. It ends where the rendering of the messages up to and
        including it ends. Some templates render the last turn differently (for example with its
        reasoning); then the end is computed from the next message: that message's length in another
        rendering is subtracted from where it ends.

        Raises:
            DataError: the template refuses the conversation, or renders messages differently when
                others follow, so that the turns cannot be located.
        """
        chat = replace(chat, messages=self._formed(place, chat))
        whole = self._render(place, chat, chat.messages)
        spans = [
            (self._start(place, chat, number, whole), self._end(place, chat, number, whole))
            for number, message in enumerate(chat.messages)
            if message["role"] == "assistant"
        ]
        if any(start > end for start, end in spans):
            raise self._inseparable(place)
        return whole, spans

    def _start(self, place: str, chat: Chat, number: int, whole: str) -> int:
        before = chat.messages[:number]
        if not before:  # templates refuse an empty conversation
            raise self._inseparable(place)
        prompt = self._render(place, chat, before, add_generation_prompt=True)
        if whole.startswith(prompt):
            return len(prompt)
        text = self._render(place, chat, before)
        if not whole.startswith(text) or not prompt.startswith(text):
            raise self._inseparable(place)
        return _shared(prompt, whole)

    def _end(self, place: str, chat: Chat, number: int, whole: str) -> int:
        messages = chat.messages
        if number == len(messages) - 1:
            return len(whole)
        text = self._render(place, chat, messages[: number + 1])
        # Phi-3's template ends the text, not every turn, with the end-of-sequence token.
        for ended in (text, text.removesuffix(self._tokenizer.eos_token or "")):
            if whole.startswith(ended):
                return len(ended)
        before, after = messages[:number], messages[: number + 2]
        try:
            begin, skipped, end = (
                self._render(place, chat, part)
                for part in (before, [*before, messages[number + 1]], after)
            )
        except DataError as error:
            raise self._inseparable(place) from error
        added = skipped[len(begin) :]
        if not (skipped.startswith(begin) and whole.startswith(end) and end.endswith(added)):
            raise self._inseparable(place)
        return len(end) - len(added)

    def _formed(self, place: str, chat: Chat) -> list[dict[str, Any]]:
        """The messages, with tool calls in the form that the template supports."""
        if not any(message.get("tool_calls") for message in chat.messages):
            return chat.messages
        if self._form is None:
            raise DataError(
                f"{place}: the chat template {self._name} leaves out or refuses the tool "
                "calls of the messages; use a template that writes them, or other data"
            )
        try:
            return [_with_calls_as(message, *self._form) for message in chat.messages]
        except (TypeError, ValueError) as error:  # arguments of other types than JSON's
            raise self._refused(place, error) from error

    @cached_property
    def _form(self) -> tuple[type, str | None] | None:
        """The first form of tool calls that the template writes; None if it refuses or
        omits all.
        """
        for form in _FORMS:
            formed = [_with_calls_as(message, *form) for message in _CALLING]
            try:
                text = self._render("a probe", EVERY_KIND, formed)
            except DataError:
                continue
            if "probed" in text:
                return form
        return None

    def _inseparable(self, place: str) -> DataError:
        return DataError(
            f"{place}: the chat template {self._name} writes messages differently before "
            "others, so its answers cannot be located; mark them in the template with "
            "{% generation %}, or count all tokens"
        )

    def _refused(self, place: str, error: BaseException) -> DataError:
        return DataError(
            f"{place}: the chat template {self._name} refuses the messages ({_reason(error)}); "
            "correct the roles and contents, or the template"
        )

    def _render(
        self, place: str, chat: Chat, messages: list[dict[str, Any]], **options: Any
    ) -> str:
        with self._guarded(place):
            return render(self._tokenizer, messages, chat.tools, **options, **self._options)

    @contextmanager
    def _guarded(self, place: str) -> Iterator[None]:
        """Inside, whatever a template raises becomes a DataError."""
        try:
            with limited_steps():
                yield
        except BaseException as error:  # a template can raise anything: 1 / 0, endless recursion
            if not is_fault(error):
                raise
            raise self._refused(place, error) from error


def _reason(error: BaseException) -> str:
    """An error of a template in words, with the line if it does not compile."""
    line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return f"{line}{kind}{one_line(error)}"


def _without_role(chat: Chat, role: str) -> Chat:
    return replace(chat, messages=[m for m in chat.messages if m["role"] != role])


def _without(chat: Chat, name: str) -> Chat:
    """The conversation without one field of its messages."""
    messages = [{k: v for k, v in message.items() if k != name} for message in chat.messages]
    return replace(chat, messages=messages)


def _shared(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _with_calls_as(message: dict[str, Any], kind: type, empty: str | None) -> dict[str, Any]:
    """The message with the arguments of its tool calls as objects or as JSON text, and with
    `empty` for empty content.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        if kind is str and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "content": message["content"] or empty, "tool_calls": calls}


@contextmanager
def limited_steps() -> Iterator[None]:
    """Inside, a template that runs more than STEP_LIMIT of its lines ends with an error.

    Templates come from untrusted sources. Jinja's sandbox, which transformers uses, limits a single
    `range` to 100,000 items, but neither nested loops nor recursive macros. Python's trace function
    counts lines, so the environment of transformers is unchanged. Memory is not limited.

    Raises:
        TemplateRuntimeError: a template ran too many lines.
    """
    previous, left = sys.gettrace(), STEP_LIMIT

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            sys.settrace(previous)  # Jinja's handling of the error is not counted
            raise TemplateRuntimeError(f"it takes more than {STEP_LIMIT:,} steps")
        return count

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return count if frame.f_code.co_filename == _TEMPLATE_FILE else None

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(previous)
