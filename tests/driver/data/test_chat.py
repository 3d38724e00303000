"""Chat templates: thinking, spans of answers, and templates in which these cannot be located."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PretrainedConfig

from reap_driver.data.encode import Document, Encoder
from reap_driver.data.records import BadRecords, Record
from reap_kernels.errors import DataError

PLAIN = (
    "{% for m in messages %}<bos>{{ m['role'] }}:{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)
MARKED = (
    "{% for m in messages %}<bos>{{ m['role'] }}:"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<eos>{% endif %}\n{% endfor %}"
)
# As Qwen3's: reasoning is written in the last turn only, which has the tags even without any.
REASONING = (
    "{% for m in messages %}<bos>{{ m['role'] }}:"
    "{% if m['role'] == 'assistant' and loop.last %}<think>{{ m['reasoning_content'] }}</think>"
    "{% endif %}{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)
# As DeepSeek-R1's: the prompt to go on opens the reasoning, which is not in the turn itself.
OPENED = PLAIN.replace("<bos>assistant:{% endif %}", "<bos>assistant:<think>{% endif %}")
# As Phi-3's: a text ends with the token that ends a sequence, a turn with another.
ENDED = PLAIN.replace("<eos>", "<pad>") + "{% if not add_generation_prompt %}<eos>{% endif %}"
# As Mistral's: what comes before the last question depends on where that is.
MOVED = "{% for m in messages %}{% if loop.last %}[tools]{% endif %}{{ m['content'] }};{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}"
    "{% if not loop.first and m['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
THINKING = "{% if enable_thinking is defined %}{{ enable_thinking }}{% else %}unset{% endif %}"

TALK = [
    {"role": "user", "content": "hi?"},
    {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "no", "reasoning_content": "ha"},
]


def encoder(folder: Path, config: PretrainedConfig, template: str, **options: Any) -> Encoder:
    (folder / "chat_template.jinja").write_text(template)
    return Encoder(folder, config, **options)


def encoded(made: Encoder, **fields: Any) -> Document:
    [document] = made.encode([Record("data.jsonl:3", fields)])
    return document


def counted(folder: Path, document: Document) -> list[str]:
    """The text of each run of counted tokens."""
    assert document.counted is not None
    assert len(document.counted) == len(document.ids)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runs: list[list[int]] = []
    for n, (token, counts) in enumerate(zip(document.ids, document.counted, strict=True)):
        if counts:
            if n == 0 or not document.counted[n - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(("wanted", "says"), [(None, "unset"), (True, "True"), (False, "False")])
def test_thinking_is_passed_on_or_left_to_the_template(
    folder: Path, config: PretrainedConfig, wanted: bool | None, says: str
) -> None:
    made = encoder(folder, config, THINKING, enable_thinking=wanted)
    assert encoded(made, messages=TALK).ids == AutoTokenizer.from_pretrained(folder)(says).input_ids


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (PLAIN, ["yes<eos>\n", "no<eos>\n"]),
        (MARKED, ["yes<eos>", "no<eos>"]),
        (REASONING, ["yes<eos>\n", "<think>ha</think>no<eos>\n"]),
        (OPENED, ["yes<eos>\n", "no<eos>\n"]),
        (ENDED, ["yes<pad>\n", "no<pad>\n<eos>"]),
    ],
    ids=["plain", "marked", "reasoning", "opened", "ended"],
)
def test_answers_are_found(
    folder: Path, config: PretrainedConfig, template: str, answers: list[str]
) -> None:
    made = encoder(folder, config, template, answers_only=True)
    document = encoded(made, messages=TALK)
    assert counted(folder, document) == answers
    assert document.ids == encoded(encoder(folder, config, template), messages=TALK).ids


def test_turns_of_tools_do_not_count(folder: Path, config: PretrainedConfig) -> None:
    messages = [*TALK[:2], {"role": "tool", "content": "3"}, {"role": "assistant", "content": "é"}]
    for template, last in ((PLAIN, "é<eos>\n"), (REASONING, "<think></think>é<eos>\n")):
        made = encoder(folder, config, template, answers_only=True)
        assert counted(folder, encoded(made, messages=messages)) == ["yes<eos>\n", last]


# Turns that call tools: as most templates write them, as DeepSeek-V3's, and as templates that know
# none or refuse them.
_EACH = "{% for m in messages %}<bos>{{ m['role'] }}:"
_CALLS = "{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments']"
OBJECTS = _EACH + "{{ m['content'] + '' }}" + _CALLS + "['n'] }};{% endfor %}{% endfor %}"
STRINGS = _EACH + "{{ m['content'] + '' }}" + _CALLS + " + ';' }}{% endfor %}{% endfor %}"
NULL = (
    _EACH + "{% if m['content'] is none %}" + _CALLS + " + ';' }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
REFUSED = "{% if messages[-1]['tool_calls'] %}{{ raise_exception('no tools') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (OBJECTS, "<bos>user:hi?<bos>assistant:1;2;"),
        (STRINGS, '<bos>user:hi?<bos>assistant:{"n": 1};{"n": 2};'),
        (NULL, '<bos>user:hi?<bos>assistant:{"n": 1};{"n": 2};'),
    ],
    ids=["objects", "strings", "null"],
)
def test_calls_are_given_in_the_form_a_template_takes(
    folder: Path, config: PretrainedConfig, template: str, text: str
) -> None:
    calls = [{"name": "f", "arguments": {"n": 1}}, {"name": "f", "arguments": '{"n": 2}'}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    # The probe's argument has another name than these calls'.
    template = template.replace(
        "['n']", "['n' if 'n' in c['function']['arguments'] else 'argument']"
    )
    document = encoded(encoder(folder, config, template), messages=[TALK[0], message])
    assert document.ids == AutoTokenizer.from_pretrained(folder)(text).input_ids


@pytest.mark.parametrize("marks", [False, True])
def test_answers_are_found_where_null_contents_are_asked_for(
    folder: Path, config: PretrainedConfig, marks: bool
) -> None:
    template = NULL.replace(_CALLS, "{% generation %}" + _CALLS) if marks else NULL
    template = template.replace(
        "{% else %}", "{% endgeneration %}{% else %}" if marks else "{% else %}"
    )
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    document = encoded(
        encoder(folder, config, template, answers_only=True), messages=[TALK[0], message]
    )
    assert counted(folder, document) == ["{};" if marks else "<bos>assistant:{};"]


@pytest.mark.parametrize("template", [PLAIN, REFUSED], ids=["left out", "refused"])
def test_a_template_without_calls_is_named(
    folder: Path, config: PretrainedConfig, template: str
) -> None:
    made = encoder(folder, config, template)
    with pytest.raises(DataError, match=r"data.jsonl:3: the chat template of .* leaves out or ref"):
        encoded(made, query="q", answers='[{"name": "f", "arguments": {}}]')
    encoded(made, messages=TALK)  # other records come


@pytest.mark.parametrize(
    ("template", "messages"),
    [(MOVED, TALK), (PLAIN, TALK[1:]), (REASONING + ALTERNATING, TALK)],
    ids=["moved", "answer first", "alternating"],
)
def test_answers_that_cannot_be_told_apart(
    folder: Path, config: PretrainedConfig, template: str, messages: list[dict[str, Any]]
) -> None:
    made = encoder(folder, config, template, answers_only=True)
    with pytest.raises(
        DataError, match=r"data.jsonl:3: the chat template of .* differently before"
    ):
        encoded(made, messages=messages)


def test_answers_of_instructions_and_prompts(folder: Path, config: PretrainedConfig) -> None:
    made = encoder(folder, config, PLAIN, answers_only=True)
    for fields in ({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}):
        assert counted(folder, encoded(made, **fields)) == ["b<eos>\n"]
    (folder / "chat_template.jinja").unlink()
    bare = Encoder(folder, config, answers_only=True)
    document = encoded(bare, instruction="a", output="bé")
    assert document.ids == AutoTokenizer.from_pretrained(folder)("a\n\nbé").input_ids
    assert counted(folder, document) == ["bé"]
    assert counted(folder, encoded(bare, prompt="a", completion="b")) == ["b"]
    assert encoded(Encoder(folder, config), prompt="a", completion="b").counted is None


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"text": "abc"}, "is a text"),
        ({"input_ids": [5]}, "has token ids without labels"),
        ({"messages": TALK[:1]}, "is a conversation in which no assistant speaks"),
    ],
)
def test_records_without_answers(
    folder: Path, config: PretrainedConfig, fields: dict[str, Any], why: str
) -> None:
    made = encoder(folder, config, PLAIN, answers_only=True)
    with pytest.raises(
        DataError, match=rf"data.jsonl:3: {why}, so it has no answer to count; give"
    ):
        encoded(made, **fields)


def test_answers_need_a_tokenizer_that_knows_its_characters(
    folder: Path, config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(AutoTokenizer.from_pretrained(folder))
    monkeypatch.setattr(kind, "is_fast", False)
    with pytest.raises(DataError, match=r"the tokenizer of .* does not give the character offsets"):
        encoded(encoder(folder, config, PLAIN, answers_only=True), messages=TALK)
    assert encoded(encoder(folder, config, PLAIN), messages=TALK).counted is None


def test_bad_records_are_counted_and_the_others_come(encoder: Encoder) -> None:
    fields = [
        {"text": "abc"},
        {"body": "no shape"},
        {"input_ids": [1, 9999]},
        {"messages": [{"role": "judge", "content": "refused"}]},
        {"messages": TALK},
        *[{"text": n} for n in range(6)],
        {"input_ids": [7]},
    ]
    records = [Record(f"data.jsonl:{n}", given) for n, given in enumerate(fields, start=1)]
    bad = BadRecords()
    documents = list(encoder.encode(records, bad))
    good = [records[n] for n in (0, 4, 11)]
    assert documents == list(encoder.encode(good))
    assert bad.count == 9
    assert [text.split(": ")[0] for text in bad.first] == [
        f"data.jsonl:{n}" for n in (2, 3, 4, 6, 7)
    ]


def test_a_model_that_cannot_read_texts_is_no_bad_record(
    folder: Path, config: PretrainedConfig, tmp_path: Path
) -> None:
    bad = BadRecords()
    with pytest.raises(DataError, match="needs the tokenizer of"):
        list(Encoder(tmp_path, config).encode([Record("a:1", {"text": "abc"})], bad))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        list(Encoder(folder, config).encode([Record("a:1", {"messages": TALK})], bad))
    assert bad.count == 0
