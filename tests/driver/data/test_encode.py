"""Converting records to token ids, and the errors of bad records."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PretrainedConfig

from reap_driver.data.encode import Encoder
from reap_driver.data.records import BadRecords, Record
from reap_kernels.errors import DataError
from tests.driver.data.conftest import EOS

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def encode(encoder: Encoder, *records: dict[str, Any]) -> list[list[int]]:
    """Token ids of records whose places are data.jsonl:1, 2, ..."""
    placed = [Record(f"data.jsonl:{n}", fields) for n, fields in enumerate(records, start=1)]
    return [document.ids for document in encoder.encode(placed)]


def test_every_kind_in_its_place(encoder: Encoder, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = "<bos>user:hi<bos>assistant:yes"
    assert encode(
        encoder,
        {"text": "abc"},
        {"input_ids": [5, 6]},
        {"messages": TALK},
        {"text": ""},
        {"text": "déjà"},
    ) == [
        tokenizer("abc")["input_ids"],
        [5, 6],
        tokenizer(rendered, add_special_tokens=False)["input_ids"],
        [],
        tokenizer("déjà")["input_ids"],
    ]


def test_the_first_known_field_counts_and_null_is_absent(encoder: Encoder) -> None:
    text, ids = encode(encoder, {"text": "abc"}, {"input_ids": [7]})
    assert encode(encoder, {"input_ids": [7], "text": "abc", "messages": TALK}) == [ids]
    assert encode(encoder, {"input_ids": None, "text": "abc", "messages": TALK}) == [text]


def test_messages_as_parquet_and_json_text_give_them(encoder: Encoder) -> None:
    [plain] = encode(encoder, {"messages": TALK})
    padded = [{**message, "name": None} for message in TALK]  # Arrow's way to say "no such key"
    assert encode(encoder, {"messages": padded}) == [plain]
    assert encode(encoder, {"messages": json.dumps(TALK)}) == [plain]


def test_tools_reach_the_template(encoder: Encoder, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer("[add]<bos>user:hi", add_special_tokens=False)["input_ids"]
    assert encode(encoder, {"messages": TALK[:1], "tools": [{"name": "add"}]}) == [expected]
    assert encode(encoder, {"messages": TALK[:1], "tools": '[{"name": "add"}]'}) == [expected]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            {"body": "a", "id": 1},
            r"no known format, which are input_ids, text, messages, .*\(it has body, id\); rename",
        ),
        ({}, "it has none at all"),
        ({"text": None}, "no known format"),
        ({"text": 5}, "text is a int; it must be a string"),
        ({"input_ids": "1 2"}, "input_ids is text, which is not JSON"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a flat list of integers"),
        ({"input_ids": [1.0]}, "input_ids must be a flat list of integers"),
        ({"input_ids": [True]}, "input_ids must be a flat list of integers"),
        ({"input_ids": [1, 259]}, r"token id 259 is outside the vocabulary of .*\(259 tokens\)"),
        ({"input_ids": [-1, 2]}, "token id -1 is outside the vocabulary"),
        ({"messages": []}, "messages must be a list of objects, at least one"),
        ({"messages": ["hi"]}, "messages must be a list of objects"),
        ({"messages": "{broken"}, "messages is text, which is not JSON"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "refuses the messages .no such role"),
        ({"messages": TALK, "tools": "add"}, "tools is text, which is not JSON"),
    ],
)
def test_what_is_wrong_is_named(encoder: Encoder, record: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=rf"data.jsonl:2: .*{says}"):
        encode(encoder, {"text": "fine"}, record)


def test_no_chat_template(encoder: Encoder, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(
        DataError, match=r"data.jsonl:1: is a conversation, but .* no chat template; give one"
    ):
        encode(encoder, {"messages": TALK})


def test_no_tokenizer_is_needed_for_ids_only(tmp_path: Path, config: PretrainedConfig) -> None:
    bare = Encoder(tmp_path, config)
    assert encode(bare, {"input_ids": [3, 4]}) == [[3, 4]]
    with pytest.raises(DataError, match=r"data.jsonl:1: needs the tokenizer of .*or give records"):
        encode(bare, {"text": "abc"})


@pytest.mark.parametrize(
    ("eos", "separator"), [(EOS, EOS), ([7, 8], 7), (None, EOS), ([], EOS), (0, 0)]
)
def test_the_separator_is_the_config_s_end_of_sequence_or_the_tokenizer_s(
    folder: Path, config: PretrainedConfig, eos: Any, separator: int
) -> None:
    config.eos_token_id = eos
    encoder = Encoder(folder, config)
    encode(encoder, {"text": "a"})
    assert encoder.separator == separator


def test_a_model_without_vocabulary_size(folder: Path, config: PretrainedConfig) -> None:
    del config.vocab_size
    encoder = Encoder(folder, config)
    assert encode(encoder, {"input_ids": [70000]}) == [[70000]]
    with pytest.raises(DataError, match="token id 2147483648"):
        encode(encoder, {"input_ids": [2**31]})


def test_a_tokenizer_with_more_tokens_than_the_model(
    folder: Path, config: PretrainedConfig
) -> None:
    config.vocab_size = 100
    encoder = Encoder(folder, config)
    assert all(token < 100 for token in encode(encoder, {"text": "abc"})[0])
    with pytest.raises(DataError, match=r"data.jsonl:1: token id \d+ is outside the vocabulary"):
        encode(encoder, {"text": "é"})
    with pytest.raises(DataError, match=r"data.jsonl:1: token id 100 is outside"):
        encode(encoder, {"input_ids": [100]})


@pytest.mark.parametrize("answers_only", [False, True])
def test_what_the_tokenizer_file_cuts_and_pads_is_not(
    folder: Path, config: PretrainedConfig, answers_only: bool
) -> None:
    whole = AutoTokenizer.from_pretrained(folder)(["abcdefg", "a"])["input_ids"]
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["truncation"] = {
        "max_length": 3,
        "strategy": "LongestFirst",
        "direction": "Right",
        "stride": 0,
    }
    facts["padding"] = {
        "strategy": {"Fixed": 5},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    path.write_text(json.dumps(facts))
    (folder / "chat_template.jinja").unlink()
    encoder = Encoder(folder, config, answers_only=answers_only)
    records = [{"prompt": "", "completion": "abcdefg"}, {"prompt": "", "completion": "a"}]
    assert encode(encoder, *records) == whole


def test_labels_say_which_ids_count(folder: Path, config: PretrainedConfig) -> None:
    ids = [5, 6, 7, 8]
    given = {"input_ids": ids, "labels": [-100, 6, -100, 8], "attention_mask": [0, 1, 1, 1]}
    record = Record("data.jsonl:1", given)
    [document] = Encoder(folder, config, answers_only=True).encode([record])
    assert (document.ids, document.counted) == ([6, 7, 8], b"\1\0\1")
    [document] = Encoder(folder, config).encode([record])
    assert (document.ids, document.counted) == ([6, 7, 8], None)
    shifted = Record("data.jsonl:1", {"input_ids": ids, "labels": [6, 7, 8, -100]})
    with pytest.raises(DataError, match=r":1: its token 0 is 5 and has the label 6; give labels"):
        list(Encoder(folder, config, answers_only=True).encode([shifted]))
    list(Encoder(folder, config).encode([shifted]))  # nothing asks for its labels


WRITING = "{% for m in messages %}{{ m['content'] }}{{ m['reasoning_content'] }}{% endfor %}"
DUMPING = "{% for m in messages %}{{ m | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (None, {"tools"}),
        (
            "{{ messages[0]['content'] }}",
            {"tools", "messages of role assistant", "messages[].mood", "messages[].thought"},
        ),
        (WRITING, {"tools", "messages[].mood"}),
        ("{{ tools }}" + DUMPING, set()),
    ],
)
def test_what_a_template_does_not_write_is_named(
    folder: Path, config: PretrainedConfig, template: str | None, names: set[str]
) -> None:
    """Also without a template. A field that one record shows to be written counts for all
    records.
    """
    path = folder / "chat_template.jinja"
    path.unlink()
    if template is not None:
        path.write_text(template.replace("reasoning_content", "thought"))
    encoder = Encoder(folder, config)
    if template is None:
        fields: dict[str, Any] = {"prompt": "a", "completion": "b"}
    else:
        answer = {**TALK[1], "mood": "m", "tool_call_id": "1"}
        fields = {"messages": [TALK[0], {**answer, "thought": "t"}]}
        encode(encoder, {"messages": [TALK[0], {**answer, "thought": ""}]})
    for n in range(70):
        record = Record(f"data.jsonl:{n}", {**fields, "tools": [{"name": "f"}]})
        list(encoder.encode([record]))
        assert record.unused == names


def test_a_field_that_some_record_shows_is_used(folder: Path, config: PretrainedConfig) -> None:
    """A template that writes reasoning in the last turn only."""
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages[-1]['thought'] }}"
    )
    encoder = Encoder(folder, config)
    answer = {**TALK[1], "thought": "t"}
    encode(encoder, {"messages": [TALK[0], answer, TALK[0]]})
    assert "messages[].thought" not in encoder.written
    encode(encoder, {"messages": [TALK[0], answer]})
    assert "messages[].thought" in encoder.written


ENDLESS = "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(30) }}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big."),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion"),
        (ENDLESS, "it takes more than 10,000 steps"),
        (LOOPS, "it takes more than 10,000 steps"),
        ("{{ messages[0].content.no.such }}", "has no attribute"),
        ("{{ messages | sum }}", "TypeError: unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for", "unexpected|Unexpected|expected"),
        ("{% include 'a' %}", "no loader"),
        ("{{ messages | tojson(indent='x' * 3, separators=1) }}", "TypeError"),
    ],
)
@pytest.mark.parametrize("answers_only", [False, True])
def test_templates_that_fail_are_named_with_the_record(
    folder: Path,
    config: PretrainedConfig,
    template: str,
    says: str,
    answers_only: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reap_driver.data.chat.STEP_LIMIT", 10_000)
    (folder / "chat_template.jinja").write_text(template)
    encoder = Encoder(folder, config, answers_only=answers_only)
    with pytest.raises(
        DataError, match=rf"^data.jsonl:1: the chat template of .*model refuses .*\(.*({says})"
    ):
        encode(encoder, {"messages": TALK})
    bad = BadRecords()
    records = [Record("data.jsonl:1", {"messages": TALK})]
    assert list(encoder.encode(records, bad)) == []
    assert bad.count == 1


@pytest.mark.parametrize("answers_only", [False, True])
def test_templates_without_a_default(
    folder: Path, config: PretrainedConfig, answers_only: bool
) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    named = [{"name": name, "template": "{{ messages }}"} for name in ("rag", "tool_use")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    encoder = Encoder(folder, config, answers_only=answers_only)
    with pytest.raises(DataError, match=r"data.jsonl:1: .*multiple chat templates with no default"):
        encode(encoder, {"messages": TALK})


def test_half_of_a_surrogate_pair_is_a_bad_record(
    encoder: Encoder, folder: Path, config: PretrainedConfig
) -> None:
    records = [Record(f"data.jsonl:{n}", {"text": text}) for n, text in enumerate(("a", "b\ud800"))]
    with pytest.raises(DataError, match=r"data.jsonl:1: its text has half of a surrogate pair as"):
        list(encoder.encode(records))
    bad = BadRecords()
    assert len(list(encoder.encode(records, bad))) == bad.count == 1
    (folder / "chat_template.jinja").write_text("{{ '\\ud800' }}")
    for answers_only in (False, True):
        made = Encoder(folder, config, answers_only=answers_only)
        with pytest.raises(DataError, match=r"data.jsonl:1: .*surrogate"):
            encode(made, {"messages": TALK})


def test_a_text_the_tokenizer_fails_on_is_a_bad_record(
    folder: Path, config: PretrainedConfig
) -> None:
    """A vocabulary without an unknown token: the library raises for the whole batch."""
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"] = {"type": "WordLevel", "vocab": {"a": 5, "b": 6}, "unk_token": "<none>"}
    facts |= {"pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "normalizer": None}
    path.write_text(json.dumps(facts))
    encoder = Encoder(folder, config)
    records = [Record(f"data.jsonl:{n}", {"text": text}) for n, text in enumerate("acb")]
    bad = BadRecords()
    assert [document.ids for document in encoder.encode(records, bad)] == [[5], [6]]
    assert bad.first[0].startswith("data.jsonl:1: the tokenizer of ")


@pytest.mark.parametrize("number", [2**24, 2**31, 2**32 - 1])
def test_ids_that_a_tokenizer_would_walk_to_are_refused(
    folder: Path, config: PretrainedConfig, number: int
) -> None:
    """Loading id 2**31 would take half a minute. The same number inside a text is accepted."""
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["vocab"]["a:11111111"] = 3
    path.write_text(json.dumps(facts))
    encode(Encoder(folder, config), {"text": "abc"})
    facts["model"]["vocab"]["zz"] = number
    path.write_text(json.dumps(facts))
    with pytest.raises(DataError, match=rf"cannot be loaded \(.*has the token id {number}; ids"):
        encode(Encoder(folder, config), {"text": "abc"})


@pytest.mark.parametrize("eos", [-1, 259, 2**40])
def test_an_end_of_sequence_outside_the_vocabulary(
    folder: Path, config: PretrainedConfig, eos: int
) -> None:
    config.eos_token_id = eos
    with pytest.raises(DataError, match=rf"its end-of-sequence token {eos} is outside its vocab"):
        _ = Encoder(folder, config).separator


@pytest.mark.parametrize("answers_only", [False, True])
def test_a_tokenizer_that_panics_is_one_error(
    folder: Path, config: PretrainedConfig, answers_only: bool
) -> None:
    """Panics of Rust code are not a subclass of Exception."""
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["post_processor"]["single"] = [{"Sequence": {"id": "B", "type_id": 0}}]
    path.write_text(json.dumps(facts))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    records = [Record(f"data.jsonl:{n}", {"messages": TALK}) for n in range(2)]
    if not answers_only:
        records = [Record(record.place, {"text": "a"}) for record in records]
    encoder, bad = Encoder(folder, config, answers_only=answers_only), BadRecords()
    assert list(encoder.encode(records, bad)) == []
    assert bad.count == 2
    with pytest.raises(DataError, match=r"^data.jsonl:0: .*\(PanicException: index out of bounds"):
        list(encoder.encode(records))
