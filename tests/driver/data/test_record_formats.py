"""The content of records of every format, and the errors of records that match none."""

import json
from typing import Any

import pytest

from reap_driver.data.record_formats import Chat, Text, Tokens, content_of
from reap_driver.data.records import Record
from reap_kernels.errors import DataError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
TALK = [USER, ANSWER]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
ADD = {"name": "add", "description": "Adds.", "parameters": SCHEMA}
WRAPPED = {"type": "function", "function": ADD}


def shape(**fields: Any) -> Tokens | Text | Chat:
    return content_of(Record("data.jsonl:7", fields))


def chat(**fields: Any) -> Chat:
    found = shape(**fields)
    assert isinstance(found, Chat)
    return found


def called(name: str, arguments: Any, id: str = "call00000") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_ids_and_texts() -> None:
    assert shape(input_ids=[1, 2], text="abc") == Tokens([1, 2])
    assert shape(text="abc", messages=TALK) == Text("abc")
    assert shape(content="abc", path="a.py", text=None) == Text("abc")
    assert shape(content="abc", messages=TALK) == Chat(TALK)


@pytest.mark.parametrize("tools", [[WRAPPED], [ADD], [{"type": "function", **ADD}]])
@pytest.mark.parametrize("dump", [json.dumps, lambda value: value])
def test_messages_and_tools_as_lists_or_json_wrapped_or_bare(tools: Any, dump: Any) -> None:
    assert shape(messages=dump(TALK), tools=dump(tools)) == Chat(TALK, [WRAPPED])


@pytest.mark.parametrize("none", [None, [], "", "[]"])
def test_no_tools(none: Any) -> None:
    assert shape(messages=TALK, tools=none) == Chat(TALK)


def test_parts_of_content_are_joined_and_other_keys_stay() -> None:
    parts = [{"type": "text", "text": "a\n"}, "b", {"text": "c"}]
    message = {"role": "user", "content": parts, "cache_control": None, "name": "me"}
    answer = {**ANSWER, "reasoning_content": "because"}
    assert chat(messages=[message, answer]).messages == [
        {"role": "user", "content": "a\nbc", "name": "me"},
        answer,
    ]


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"n": 1}, {"n": 1}),
        ('{"n": 1}', {"n": 1}),
        ("", {}),
        (None, {}),
        ("not JSON", "not JSON"),
        ("[1]", "[1]"),
    ],
)
def test_arguments_of_calls_become_objects(given: Any, arguments: Any) -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": given}},
        {"name": "add", "arguments": given},
    ]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    expected = [called("add", arguments, "1"), called("add", arguments, "call00001")]
    for tool_calls in (calls, json.dumps(calls)):
        found = chat(messages=[USER, {**message, "tool_calls": tool_calls}]).messages[1]
        assert found == {"role": "assistant", "content": "", "tool_calls": expected}


@pytest.mark.parametrize("none", [[], None, "", "[]"])
def test_no_calls(none: Any) -> None:
    assert chat(messages=[USER, {**ANSWER, "tool_calls": none}]).messages == TALK


def test_an_instruction_and_its_answer() -> None:
    assert shape(instruction="Add.", input="1 2", output="3") == Chat(
        [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
        plain=Text("Add.\n\n1 2\n\n3", 11),
    )
    system = {"role": "system", "content": "Be brief."}
    assert shape(instruction="hi", input="", output="yes", system="Be brief.") == Chat(
        [system, *TALK], plain=Text("Be brief.\n\nhi\n\nyes", 15)
    )


def test_prompt_and_completion() -> None:
    assert shape(prompt="hi", completion="yes") == Chat(TALK, plain=Text("hiyes", 2))
    assert shape(prompt=[USER], completion=[ANSWER], tools=[ADD]) == Chat(TALK, [WRAPPED])
    assert shape(prompt=[USER], completion="yes") == Chat(TALK)
    assert shape(prompt="hi", completion=[ANSWER]) == Chat(TALK)
    # ultrachat_200k has both: the messages, of which the prompt is the first
    assert shape(prompt="hi", messages=TALK) == Chat(TALK)


def test_query_and_answers_become_calls_of_tools() -> None:
    tools = [
        {
            "name": "live_giveaways",
            "description": "Giveaways.",
            "parameters": {
                "type": {"description": "Kind.", "type": "str", "default": "beta"},
                "ids": {"description": "Which.", "type": "List[int]"},
                "deep": {"description": "Deep.", "type": "bool, optional"},
                "f": {"description": "Odd.", "type": "Callable[[float], float]"},
            },
        }
    ]
    answers = [
        {"name": "live_giveaways", "arguments": {"type": "beta"}},
        {"name": "live_giveaways", "arguments": {"type": "game"}},
    ]
    found = chat(id=1, query="Where?", tools=json.dumps(tools), answers=json.dumps(answers))
    assert found.messages == [
        {"role": "user", "content": "Where?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                called("live_giveaways", {"type": "beta"}),
                called("live_giveaways", {"type": "game"}, "call00001"),
            ],
        },
    ]
    assert found.tools is not None
    assert found.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "type": {"description": "Kind.", "type": "string", "default": "beta"},
            "ids": {"description": "Which.", "type": "array"},
            "deep": {"description": "Deep.", "type": "boolean"},
            "f": {"description": "Odd.", "type": "Callable[[float], float]"},
        },
        "required": ["ids", "f"],
    }
    assert shape(query="hi", answers="[]") == Chat([USER, {"role": "assistant", "content": ""}])


def test_conversations() -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"n\\": 1}"}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3."},
    ]
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [called("add", {"n": 1})]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3."},
    ]
    assert shape(conversations=turns, tools=json.dumps([ADD])) == Chat(expected, [WRAPPED])
    assert shape(conversations=json.dumps(turns[1:]), system="Be brief.") == Chat(expected)
    assert shape(conversations=TALK) == Chat(TALK)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"instruction": "a"},
            r"no known format, .*instruction \+ output, .*\(it has instruction\)",
        ),
        ({"prompt": "a", "completion": None}, r"\(it has prompt\); rename its fields"),
        ({"instruction": 1, "output": "b"}, "instruction is a int; it must be a string"),
        ({"content": ["a"]}, "content is a list; it must be a string"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] has no role; give every message one"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
            r"messages\[0\] has a part of type 'video_url'; only parts of text",
        ),
        (
            {"messages": [{**ANSWER, "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            r"messages\[0\].tool_calls has a call without a name; give {name, arguments}",
        ),
        ({"messages": [{**ANSWER, "tool_calls": "{}"}]}, "tool_calls must be a list of objects$"),
        ({"messages": TALK, "tools": [{"type": "code"}]}, r"tools\[0\] has no name; give {name,"),
        ({"messages": TALK, "tools": '"add"'}, "tools must be a list of objects"),
        ({"query": "a", "answers": "add(1)"}, "answers is text, which is not JSON"),
        (
            {"conversations": [{"from": "judge", "value": "a"}]},
            "conversations are from 'judge', which is not known; give one of system, human, ",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            "the function_call is text, which is not JSON",
        ),
        ({"prompt": [USER], "completion": []}, "completion must be a list of objects, at least"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            r"the content of messages\[0\] is a int; give a text, or a list of parts",
        ),
        ({"conversations": [{"from": "gpt", "value": {}}]}, r"conversations\[0\] is a dict; give"),
        ({"messages": "[" * 100000}, "messages is text, which is nested deeper than 64 levels"),
        ({"messages": '[{"role": "a", "role": "b"}]'}, "which has the name 'role' twice"),
        ({"messages": '[{"role": "\\ud800"}]'}, "messages is text, which holds a text that no"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=rf"^data.jsonl:7: .*{says}"):
        shape(**fields)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, Tokens([5, 6, 7, 8])),
        ({"attention_mask": [0, 1, 1, 0]}, Tokens([6, 7])),
        ({"attention_mask": [True, True, False, True]}, Tokens([5, 6, 8])),
        ({"attention_mask": [0, 0, 0, 0]}, Tokens([])),
        ({"labels": [-100, 6, 7, 8]}, Tokens([5, 6, 7, 8], [-100, 6, 7, 8])),
        ({"labels": [-100, 6, -100, 8], "attention_mask": [0, 0, 1, 1]}, Tokens([7, 8], [-100, 8])),
    ],
)
def test_masked_ids_are_left_out(fields: dict[str, Any], shape: Tokens) -> None:
    assert content_of(Record("a:1", {"input_ids": [5, 6, 7, 8], **fields})) == shape


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, 1], r"input_ids has 3 entries and {name} 2; give one for each token"),
        ([1, 1, 1, 1], r"input_ids has 3 entries and {name} 4"),
        ([[1, 1, 1]], "{name} must be a flat list of integers"),
        ("111", "{name} must be a flat list of integers"),
        ([1, 1.0, 1], "{name} must be a flat list of integers"),
    ],
)
def test_fields_beside_ids_must_fit(name: str, value: Any, says: str) -> None:
    with pytest.raises(DataError, match=f"^data.jsonl:7: {says.format(name=name)}"):
        shape(**{"input_ids": [1, 2, 3], name: value})


def test_numbered_documents_in_a_mask_are_refused() -> None:
    with pytest.raises(DataError, match=r"attention_mask must hold 0 and 1 only; give documents"):
        shape(input_ids=[1, 2, 3], attention_mask=[1, 1, 2])


def unused_of(**fields: Any) -> set[str]:
    record = Record("data.jsonl:7", fields)
    content_of(record)
    return record.unused


CALL = {"name": "add", "arguments": {}}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"input_ids": [1], "attention_mask": [1], "labels": [1], "token_type_ids": [0]}, set()),
        ({"input_ids": [1], "position_ids": [0], "text": "a"}, {"position_ids", "text"}),
        ({"text": "a", "id": 5, "meta": {"a": 1}, "url": "u"}, set()),
        ({"text": "a", "summary": "b", "tools": [], "title": "", "c": None}, {"summary"}),
        ({"messages": TALK, "tools": [ADD], "system": "s"}, {"system"}),
        ({"conversations": TALK, "tools": [ADD], "system": "s", "chosen": 1}, {"chosen"}),
        ({"instruction": "a", "output": "b", "system": "s", "history": [["a", "b"]]}, {"history"}),
        ({"prompt": "a", "completion": "b", "system": "s"}, {"system"}),
        ({"query": "a", "answers": [CALL], "tools": [ADD]}, set()),
        ({"query": "a", "answers": [CALL | {"result": 3}]}, {"tool_calls[].result"}),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"function": CALL | {"x": 1}, "y": 2}]}]},
            {"tool_calls[].x", "tool_calls[].y"},
        ),
        ({"messages": TALK, "tools": [{**WRAPPED, "cost": 3}]}, {"tools[].cost"}),
        (
            {"messages": [{"role": "user", "content": [{"text": "a", "voice": "b"}]}]},
            {"content[].voice"},
        ),
        ({"content": "a", "prompt": "b"}, {"prompt"}),
    ],
)
def test_fields_beside_a_shape_are_named(fields: dict[str, Any], names: set[str]) -> None:
    assert unused_of(**fields) == names


def test_what_turns_of_a_conversation_have_stays() -> None:
    turn = {"from": "gpt", "value": "yes", "thought": "hm"}
    expected = {**ANSWER, "thought": "hm"}
    assert chat(conversations=[{"from": "human", "value": "hi"}, turn]).messages == [USER, expected]


SYSTEM, PARTING = {"role": "system", "content": "s"}, {"role": "user", "content": "more"}


@pytest.mark.parametrize(
    ("fields", "messages", "plain"),
    [
        ({"question": "q", "answer": "a #### 7"}, ["q", "a #### 7"], "q\n\na #### 7"),  # GSM8K
        (
            {"problem": "p", "level": "Level 5", "type": "Algebra", "solution": "s"},  # MATH
            ["p", "s"],
            "p\n\ns",
        ),
        (
            {"id": "1", "system_prompt": "s", "question": "q", "response": "r"},  # OpenOrca
            ["s", "q", "r"],
            "s\n\nq\n\nr",
        ),
        (
            {"instruction": "i", "context": "c", "response": "r", "category": "qa"},  # Dolly
            ["i\n\nc", "r"],
            "i\n\nc\n\nr",
        ),
        ({"instruction": "i", "context": "", "response": "r"}, ["i", "r"], "i\n\nr"),
        ({"prompt": "p", "response": "r"}, ["p", "r"], "p\n\nr"),
        ({"problem": "p", "solution": "s", "answer": "7"}, ["p", "s"], "p\n\ns"),  # NuminaMath
        (
            {"system": "s", "question": "q", "chosen": "c", "rejected": "r"},  # orca_dpo_pairs
            ["s", "q", "c"],
            "s\n\nq\n\nc",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ["p", "c"], "p\n\nc"),
    ],
)
def test_questions_with_answers_of_published_data_sets(
    fields: dict[str, Any], messages: list[str], plain: str
) -> None:
    found = chat(**fields)
    assert [message["content"] for message in found.messages] == messages
    assert found.messages[-1]["role"] == "assistant"
    assert found.plain == Text(plain, plain.rindex(messages[-1]))


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        # UltraFeedback-binarized, of HuggingFaceH4 and of TRL
        ({"prompt": "hi", "chosen": TALK, "rejected": TALK, "messages": TALK}, TALK),
        ({"prompt": "hi", "prompt_id": "x", "chosen": TALK, "score_chosen": 8.5}, TALK),
        ({"chosen": TALK, "rejected": TALK}, TALK),
        ({"prompt": [USER], "chosen": [ANSWER]}, TALK),
        ({"prompt": [SYSTEM, USER], "chosen": "yes"}, [SYSTEM, *TALK]),
        ({"prompt": "hi", "chosen": [ANSWER], "system": "s"}, [SYSTEM, *TALK]),
        ({"chosen": [SYSTEM, *TALK], "system": "other"}, [SYSTEM, *TALK]),
        # OpenThoughts-114k, and data sets that call the list `conversation`
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "user", "value": "hi"},
                    {"from": "assistant", "value": "yes"},
                ],
            },
            [SYSTEM, *TALK],
        ),
        ({"conversation": TALK, "model": "m", "turn": 1}, TALK),
        (
            {"conversation": [{"from": "human", "value": "hi"}, {"from": "bot", "value": "yes"}]},
            TALK,
        ),
        ({"messages": TALK, "num_tokens": 5, "source": "x"}, TALK),  # Mixture-of-Thoughts
    ],
)
def test_conversations_of_published_data_sets(
    fields: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    assert chat(**fields).messages == messages


def test_texts_of_published_data_sets() -> None:
    assert shape(chosen="Human: hi Assistant: yes", rejected="no") == Text(
        "Human: hi Assistant: yes"
    )
    assert shape(code="def f(): ...", language="Python", func_name="f") == Text("def f(): ...")
    assert shape(input_ids="[1, 2]") == Tokens([1, 2])
    record = Record("a", {"content": "x", "avg_line_length": 1.0, "lang": "Python", "path": "a.py"})
    assert content_of(record) == Text("x")
    assert record.unused == set()


def test_calls_and_answers_of_tools_by_other_names() -> None:
    call = json.dumps({"name": "add", "arguments": {"n": 1}})
    turns = [{"from": "user", "value": "hi"}, {"from": "tool_call", "value": call}]
    found = chat(conversation=[*turns, {"from": "tool_response", "value": "2"}])
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool"]
    assert found.messages[1]["tool_calls"] == [called("add", {"n": 1})]


def test_of_two_formats_the_first_counts_and_the_other_is_noted() -> None:
    record = Record("a", {"question": "q", "answer": "a", "code": "c", "rejected": "r"})
    assert [message["content"] for message in content_of(record).messages] == ["q", "a"]  # type: ignore[union-attr]
    assert record.unused == {"code", "rejected"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"question": "q", "answer": 2}, "answer is a int; it must be a string"),
        ({"chosen": 5}, "chosen is a int; it must be a string"),
        ({"chosen": []}, "chosen must be a list of objects, at least one"),
        ({"prompt": "p", "chosen": [{"content": "x"}]}, r"chosen\[0\] has no role"),
        (
            {"question": "q", "choices": ["a"]},
            r"question \+ answer, .* \(it has choices, question\)",
        ),
        ({"data": TALK}, "if its records are those in data, give that list as the file"),
        ({"conversation": "text"}, "conversation is text, which is not JSON"),
    ],
)
def test_fields_of_wrong_kinds_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=rf"^data.jsonl:7: .*{says}"):
        shape(**fields)
