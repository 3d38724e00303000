"""Converts messages and tools of records to the form that chat templates of transformers take.

Content is text: its parts are joined unless there are images among them (`image_parts`). A tool is
an object `{"type": "function", "function": ...}` with a JSON schema of its parameters. A tool call
is `{"type": "function", "function": {"name", "arguments"}}` with an id of nine characters and
arguments as an object; a message with tool calls has content, which may be empty. Other fields of
messages are kept, such as `reasoning_content`; other fields of tool calls, tools and parts of
content are recorded as unused.
"""

import re
from typing import Any

from reap_driver.data.image_parts import image_part
from reap_driver.data.records import Record, unused
from reap_kernels.documents import parse_json
from reap_kernels.errors import DataError
from reap_kernels.schema import short

# Values of `from` in ShareGPT and formats derived from it -> roles.
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
# Fields of a tool call and of its function that are used.
_CALL = ("id", "type", "function", "name", "arguments")
# Types of Python signatures -> types of JSON schema.
_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "set": "array",
    "tuple": "array",
    "dict": "object",
}


def list_of_objects(
    record: Record, name: str, value: Any = None, *, least: int = 1
) -> list[dict[str, Any]]:
    """A field that is a list of objects, or JSON text of such a list.

    Args:
        record: the record.
        name: name of the field.
        value: used instead of the field's value.
        least: minimum length of the list.

    Raises:
        DataError: the value is anything else.
    """
    value = parsed(record, name, record.fields[name] if value is None else value)
    if (
        not isinstance(value, list)
        or len(value) < least
        or not all(isinstance(item, dict) for item in value)
    ):
        raise DataError(
            f"{record.place}: {name} must be a list of objects" + ", at least one" * (least > 0)
        )
    return value


def checked_messages(record: Record, name: str, value: Any = None) -> list[dict[str, Any]]:
    """The messages in a field.

    Raises:
        DataError: it is not a list of messages, a message has no role, or it has parts other than
            text and images.
    """
    messages, calls = [], 0
    for number, given in enumerate(list_of_objects(record, name, value)):
        message = {key: item for key, item in given.items() if item is not None}
        if not isinstance(message.get("role"), str):
            raise DataError(f"{record.place}: {name}[{number}] has no role; give every message one")
        if "content" in message:
            message["content"] = _content(record, f"{name}[{number}]", message["content"])
        if "tool_calls" in message:
            what = f"{name}[{number}].tool_calls"
            found = list_of_objects(record, what, message.pop("tool_calls") or [], least=0)
            if found:
                named = [tool_call(record, what, c, calls + n) for n, c in enumerate(found)]
                message = {"content": "", **message, "tool_calls": named}
                calls += len(named)
        messages.append(message)
    return messages


def checked_tools(record: Record) -> list[dict[str, Any]] | None:
    """The tools of a record in the format of OpenAI's API; None if it has none.

    Raises:
        DataError: the field is not a list of tools.
    """
    if not record.fields.get("tools"):
        return None
    tools = []
    for number, tool in enumerate(list_of_objects(record, "tools", least=0)):
        bare = {key: value for key, value in tool.items() if key != "type"}
        function = tool.get("function", bare)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{record.place}: tools[{number}] has no name; give {{name, description, "
                "parameters}, or that as the function of {type, function}"
            )
        if function is not bare:
            record.unused.update(unused(tool, ("type", "function"), "tools[]."))
        tools.append({"type": "function", "function": _with_schema(function)})
    return tools or None


def tool_call(record: Record, name: str, call: dict[str, Any], number: int) -> dict[str, Any]:
    """A tool call, given with or without the object `function`, with its arguments as an object.

    Arguments that are not an object or the JSON text of one stay as they are: models write invalid
    arguments too.

    Args:
        record: the record.
        name: name of the field.
        call: the call as given.
        number: number of the call in the record, from which an id is made if the call has none.
            (Mistral's templates require nine characters.)

    Raises:
        DataError: it has no function name.
    """
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{record.place}: {name} has a call without a name; give {{name, arguments}}"
        )
    for given in (call, function):
        record.unused.update(unused(given, _CALL, "tool_calls[]."))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = parse_json(arguments or "{}", plain=False)
        except ValueError:
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    called = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {"id": call.get("id") or f"call{number:05}", "type": "function", "function": called}


def turn(record: Record, given: dict[str, Any]) -> dict[str, Any]:
    """A message from an object with `from` and `value`; its other fields are kept.

    Raises:
        DataError: the role is not known, or a tool call is not valid JSON.
    """
    message = dict(given)
    role, value = message.pop("from"), message.pop("value", None)
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise DataError(
            f"{record.place}: conversations are from {short(role)}, which is not known; give one "
            f"of {', '.join(_ROLES)}"
        )
    if role in ("function_call", "tool_call"):
        calls = parsed(record, f"the {role}", value)
        calls = [calls] if isinstance(calls, dict) else calls
        return {**message, "role": known, "tool_calls": calls}
    return {**message, "role": known, "content": value}


def parsed(record: Record, name: str, value: Any) -> Any:
    """The value that a text is the JSON of; another value as it is.

    Raises:
        DataError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, plain=False)
    except ValueError as error:
        raise DataError(f"{record.place}: {name} is text, which {error}; correct it") from error


def _content(record: Record, what: str, content: Any) -> str | list[dict[str, Any]]:
    """The content of a message: a text, also from parts `{"type": "text", "text": ...}` and
    strings; a list of parts if there are images among them.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(
            f"{record.place}: the content of {what} is a {type(content).__name__}; give a text, or "
            "a list of parts"
        )
    parts: list[dict[str, Any]] = []
    for part in content:
        image = image_part(record, what, part) if isinstance(part, dict) else None
        parts.append(image or {"type": "text", "text": _text_of(record, what, part)})
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _text_of(record: Record, what: str, part: Any) -> str:
    """The text of a part of content. Raises DataError for parts of other types."""
    text = part.get("text") if isinstance(part, dict) else part
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if kind != "text" or not isinstance(text, str):
        raise DataError(
            f"{record.place}: {what} has a part of type {short(kind)}; only parts of text and "
            "images can be read, so leave out or describe the others"
        )
    if isinstance(part, dict):
        record.unused.update(unused(part, ("type", "text"), "content[]."))
    return text


def _with_schema(function: dict[str, Any]) -> dict[str, Any]:
    """The function with a JSON schema, if its parameters are `{name: {type, description}}`.

    xlam-function-calling-60k has this form. Its types are Python's ("List[int], optional"); a
    parameter is optional if its type says so or it has a default.
    """
    parameters = function.get("parameters")
    if (
        not isinstance(parameters, dict)
        or "properties" in parameters
        or isinstance(parameters.get("type"), str)
        or not all(isinstance(value, dict) for value in parameters.values())
    ):
        return function
    properties, required = {}, []
    for name, given in parameters.items():
        kind = str(given.get("type", ""))
        known = _TYPES.get(re.split(r"\W", kind.strip(), maxsplit=1)[0].lower())
        properties[name] = given if known is None else {**given, "type": known}
        if "optional" not in kind.lower() and "default" not in given:
            required.append(name)
    schema = {"type": "object", "properties": properties, "required": required}
    return {**function, "parameters": schema}
