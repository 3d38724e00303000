"""Renders messages with a tokenizer's chat template, null contents included.

`apply_chat_template` of transformers 5.24 leaves out keys whose value is null (that of 5.18 does
not), but templates such as DeepSeek-V3's write tool calls only of messages whose content is null.
The library's function that renders a template keeps them in all versions.
"""

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

Span = tuple[int, int]


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    **options: Any,
) -> str:
    """The messages as text.

    Args:
        tokenizer: has the chat template.
        messages: of one conversation.
        tools: tools with JSON schemas; None if there are none.
        **options: for the template, such as `add_generation_prompt`.

    Raises:
        BaseException: of any class; a template can raise anything.
    """
    if any(message.get("content", "") is None for message in messages):
        return _direct(tokenizer, messages, tools, **options)[0]
    # A tokenizer's own method may do more, such as sorting the tools' keys.
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options))


def render_marked(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    **options: Any,
) -> tuple[str, list[Span]]:
    """The messages as text, and the spans [start, end) that the template marks by
    `{% generation %}`.

    Raises:
        BaseException: see `render`.
    """
    return _direct(tokenizer, messages, tools, return_assistant_tokens_mask=True, **options)


def _direct(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    **options: Any,
) -> tuple[str, list[Span]]:
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=tokenizer.get_chat_template(None, tools),
        **{**tokenizer.special_tokens_map, **options},
    )
    return str(texts[0]), [(start, end) for start, end in spans[0]] if spans else []
