"""Messages and tools of records, in the one form that chat templates of transformers take.

Content is text; parts of it are joined, but where images stand between them (`image_parts`). A tool
is an object `{"type": "function", "function": ...}` with a JSON schema of its parameters, a tool
call `{"type": "function", "function": {"name", "arguments"}}` with an id of nine characters and
arguments as an object; the message that has it has content, if only an empty one. Everything else a
message has stays, such as `reasoning_content`; what else a call, a tool or a part of content has is
noted in the record as not used.
"""

import re
from typing import Any

from reap_driver.data.image_parts import image_part
from reap_driver.data.records import Record, unused
from reap_kernels.documents import parse_json
from reap_kernels.errors import DataError
from reap_kernels.schema import short

# Names of roles in `from`, as ShareGPT and its descendants write them.
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# What is taken of a call and of its function.
_CALL = ("id", "type", "function", "name", "arguments")
# JSON schema's names of the types in Python signatures.
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
    """A field that is a list of objects, or JSON text of one.

    Args:
        record: which has it.
        name: of the field.
        value: instead of the field's.
        least: how many there must be.

    Raises:
        DataError: it is anything else.
    """
    value = _parsed(record, name, record.fields[name] if value is None else value)
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
        DataError: it is no list of messages, or a message has no role, or parts other than text and
            images.
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
    """The tools of a record, wrapped as OpenAI's interface has them; None where it has none.

    Raises:
        DataError: the field is no list of tools.
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
    """A call, bare or wrapped, with its arguments as an object.

    Arguments that are no JSON text of an object stay as they are: models write such ones too.

    Args:
        record: which has it.
        name: of the field.
        call: as it is there.
        number: in the record; makes an id where the call has none (Mistral's templates refuse
            others than of nine characters).

    Raises:
        DataError: it names no function.
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
    """A message of `from` and `value`; what else is given stays.

    Raises:
        DataError: the role is not known, or a call of tools is no JSON.
    """
    message = dict(given)
    role, value = message.pop("from"), message.pop("value", None)
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise DataError(
            f"{record.place}: conversations are from {short(role)}, which is not known; give one "
            f"of {', '.join(_ROLES)}"
        )
    if role == "function_call":
        calls = _parsed(record, "the function_call", value)
        calls = [calls] if isinstance(calls, dict) else calls
        return {**message, "role": known, "tool_calls": calls}
    return {**message, "role": known, "content": value}


def _parsed(record: Record, name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, plain=False)
    except ValueError as error:
        raise DataError(f"{record.place}: {name} is text, which {error}; correct it") from error


def _content(record: Record, what: str, content: Any) -> str | list[dict[str, Any]]:
    """A text, or the one that parts `{"type": "text", "text": ...}` and strings make; with images
    among them, all parts.
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
    """Of a part of a content; the one place where parts of other types are refused."""
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
    """The function with JSON schema for parameters given as `{name: {type, description}}`.

    That is how xlam-function-calling-60k gives them; its types are Python's ("List[int],
    optional"), and a parameter is optional where the type says so or there is a default.
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
