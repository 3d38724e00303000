"""Chat templates from files, and the check of a template before any data is tokenized."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PretrainedConfig

from reap_driver.data.encode import Encoder
from reap_driver.data.records import Record
from reap_driver.data.source import DataSource
from reap_driver.data.template_check import check_template
from reap_driver.data.template_file import read_template
from reap_kernels.errors import DataError

OTHER = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
RULES = [{"role": "system", "content": "be brief"}, *TALK]
CALL = {"name": "f", "arguments": {"n": 1}}
CALLS = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TOOL = {"name": "f", "description": "F.", "parameters": {}}
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no rules') }}{% endif %}"


def made(folder: Path, config: PretrainedConfig, template: str | None) -> Encoder:
    if template is None:
        (folder / "chat_template.jinja").unlink()
    else:
        (folder / "chat_template.jinja").write_text(template)
    return Encoder(folder, config)


def source(path: Path, *rows: dict[str, Any], **more: Any) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path, path.stem, **more)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.jinja", OTHER, OTHER),
        ("t.j2", "\ufeff" + OTHER, OTHER),
        ("tokenizer_config.json", json.dumps({"chat_template": OTHER, "eos_token": "x"}), OTHER),
        # transformers writes this number for "no limit" into every tokenizer_config.json.
        ("t.json", json.dumps({"chat_template": OTHER, "model_max_length": int(1e30)}), OTHER),
        (
            "t.json",
            json.dumps({"chat_template": [{"name": "default", "template": OTHER}]}),
            {"default": OTHER},
        ),
    ],
)
def test_files_that_hold_a_template(tmp_path: Path, name: str, content: str, expected: Any) -> None:
    (tmp_path / name).write_text(content)
    found = read_template(tmp_path / name)
    assert found.template == expected
    assert found.digest.startswith("sha256:")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jinja", None, r"none.jinja' cannot be read \(No such file"),
        ("folder.jinja", "", r"folder.jinja' cannot be read \(a folder\)"),
        ("t.jinja", b" \n", "t.jinja' is empty"),
        ("t.jinja", b"\xff\xfe", "t.jinja' is not UTF-8"),
        ("t.jinja", b" " * (2**22 + 1), "is larger than 4194304 bytes"),
        ("t.json", b"{", "t.json' is not JSON"),
        ("t.json", b"{}", "t.json' has no text as chat_template"),
        ("t.json", b"[]", "t.json' has no text as chat_template"),
        ("t.json", b'{"chat_template": 5}', "t.json' has no text as chat_template"),
        ("t.json", b'{"chat_template": ""}', "t.json' is empty"),
        ("t.json", b'{"chat_template": [{"name": "a"}]}', "has no text as chat_template"),
        ("t.json", b'{"chat_template": []}', "has no text as chat_template"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, name: str, content: Any, says: str) -> None:
    path = tmp_path / name
    if content == "":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^chat template '.*{says}.*; give a .jinja file, or a"):
        read_template(path)


def test_a_given_template_replaces_the_tokenizers(
    folder: Path, config: PretrainedConfig, tmp_path: Path
) -> None:
    record = Record("a.jsonl:1", {"messages": TALK})
    (tmp_path / "t.jinja").write_text(OTHER)
    given = read_template(tmp_path / "t.jinja")
    [own] = Encoder(folder, config).encode([record])
    [other] = Encoder(folder, config, chat_template=given).encode([record])
    [text] = Encoder(folder, config).encode([Record("b", {"text": "user=hi;assistant=yes;"})])
    assert other.ids == text.ids != own.ids


def test_records_without_conversations_need_no_template(
    folder: Path, config: PretrainedConfig, tmp_path: Path
) -> None:
    rows = [{"text": "a"}, {"instruction": "a", "output": "b"}, {"input_ids": [1]}, {"body": 1}]
    plain = source(tmp_path / "a.jsonl", *rows)
    check_template(made(folder, config, None), [plain], skip_bad=False)
    chat = source(tmp_path / "b.jsonl", {"text": "a"}, {"messages": TALK})
    with pytest.raises(DataError, match=r"b.jsonl:2: is a conversation, but .* no chat template"):
        check_template(Encoder(folder, config), [chat], skip_bad=False)


@pytest.mark.parametrize(
    ("template", "row", "says"),
    [
        ("{% for %}", {"messages": TALK}, r"for conversations \(line 1: "),
        ("{% for %}", {"messages": CALLS}, r"for conversations \(line 1: "),
        ("{{ 1 / 0 }}", {"messages": TALK}, r"for conversations \(ZeroDivisionError: "),
        ("{{ 1 / 0 }}", {"instruction": "a", "output": "b"}, r"for conversations \(ZeroDivision"),
        (
            "question, answer",
            {"messages": TALK},
            r"\(it does not write the question and the answer\)",
        ),
        (
            "{{ messages[0]['content'] }}",
            {"messages": TALK},
            r"for conversations \(it does not write the answer\)",
        ),
        (NO_SYSTEM + OTHER, {"messages": RULES}, r"with a system message \(no rules\)"),
        (
            "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + OTHER,
            {"messages": TALK, "tools": [TOOL]},
            r"for conversations with tools \(no tools\)",
        ),
    ],
    ids=[
        "syntax",
        "syntax before tool calls",
        "fault",
        "instruction",
        "constant",
        "no answer",
        "system",
        "tools",
    ],
)
def test_templates_that_cannot_be_used_are_found_first(
    folder: Path,
    config: PretrainedConfig,
    tmp_path: Path,
    template: str,
    row: dict[str, Any],
    says: str,
) -> None:
    sources = [source(tmp_path / "a.jsonl", {"text": "a"}), source(tmp_path / "b.jsonl", row)]
    encoder = made(folder, config, template)
    with pytest.raises(DataError, match=rf"b.jsonl:1: the chat template of .*{says}.*; correct it"):
        check_template(encoder, sources, skip_bad=False)


def test_templates_that_leave_out_tool_calls_are_found_first(
    folder: Path, config: PretrainedConfig, tmp_path: Path
) -> None:
    row = {"messages": CALLS}
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template of .* leaves out or refus"):
        check_template(
            made(folder, config, OTHER), [source(tmp_path / "a.jsonl", row)], skip_bad=False
        )


def test_what_records_have_besides_is_theirs_where_bad_ones_are_skipped(
    folder: Path, config: PretrainedConfig, tmp_path: Path
) -> None:
    rules = source(tmp_path / "a.jsonl", {"messages": RULES})
    encoder = made(folder, config, NO_SYSTEM + OTHER)
    check_template(encoder, [rules], skip_bad=True)
    with pytest.raises(DataError, match="with a system message"):
        check_template(encoder, [rules], skip_bad=False)


def test_tools_of_a_source_are_checked(
    folder: Path, config: PretrainedConfig, tmp_path: Path
) -> None:
    given = source(tmp_path / "a.jsonl", {"messages": TALK}, tools=json.dumps([TOOL]))
    refuses = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + OTHER
    with pytest.raises(DataError, match="with tools"):
        check_template(made(folder, config, refuses), [given], skip_bad=False)


class _Streamed:
    """What `load_dataset` returns for streaming, as far as it is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def take(self, count: int) -> list[dict[str, Any]]:
        return self._rows[:count]


@pytest.mark.parametrize("template", [None, NO_SYSTEM + OTHER], ids=["missing", "refuses"])
def test_data_sets_of_the_hub_are_not_downloaded_first(
    folder: Path, config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    asked: list[dict[str, Any]] = []

    def load(name: str, subset: str | None, **options: Any) -> _Streamed:
        asked.append(options)
        return _Streamed([{"messages": RULES}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    encoder = made(folder, config, template)
    with pytest.raises(DataError, match=r"owner/name, row 1: .*chat template"):
        check_template(encoder, [DataSource.parse("owner/name")], skip_bad=False)
    assert [options["streaming"] for options in asked] == [True]


def test_data_sets_of_the_hub_are_left_alone_where_all_can_be_rendered(
    encoder: Encoder, folder: Path, config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(name: str, subset: str | None, **options: Any) -> _Streamed:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    sources = [DataSource.parse("owner/name")]
    check_template(encoder, sources, skip_bad=False)
    assert asked == []
    check_template(made(folder, config, None), sources, skip_bad=False)
    assert asked == ["owner/name"]  # it cannot be looked at; reading it will say why
