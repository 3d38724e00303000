"""Options of data from the command line to statistics: packing, answers, recipes, folds, groups."""

import bz2
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import reap_driver as rd
from reap_driver.data.encode import Encoder
from tests.driver.cli.conftest import Run, write_model
from tests.driver.cli.test_bad_input import listing

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Documents of 1 to 40 tokens."""
    lengths = [(7 * i) % 40 + 1 for i in range(25)]
    records = [{"input_ids": [(3 * j + n) % 250 for j in range(n)]} for n in lengths]
    return write(tmp_path / "documents.jsonl", records)


@pytest.fixture
def chats(model: Path, tmp_path: Path) -> Path:
    """Conversations; the model gets a chat template."""
    (model / "chat_template.jinja").write_text(TEMPLATE)
    turns = [
        [{"role": "user", "content": "q" * i}, {"role": "assistant", "content": "answer" * i}]
        for i in range(1, 9)
    ]
    return write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in turns])


def observed(run: Run, out: Path, *words: object) -> rd.SaliencyStats:
    done = run("observe", *words, "--out", out)
    assert done.code == 0, done.err
    return rd.SaliencyStats.load(out)


def assert_close(mine: rd.SaliencyStats, theirs: rd.SaliencyStats, rtol: float) -> None:
    assert mine.groups == theirs.groups
    for name, layer in mine.layers.items():
        other = theirs.layers[name]
        assert torch.equal(layer.counts, other.counts)
        assert torch.equal(layer.tokens, other.tokens)
        torch.testing.assert_close(layer.sums, other.sums, rtol=rtol, atol=0)


@pytest.mark.parametrize("stream", ["never", "always"])
def test_isolated_documents_are_to_the_model_what_each_is_alone(
    run: Run, model: Path, documents: Path, tmp_path: Path, stream: str
) -> None:
    """Ten to a sequence, and one: routed alike but for the separators; end to end they are not."""
    lengths = [len(json.loads(line)["input_ids"]) for line in documents.open()][:10]
    texts = ["".join(chr(33 + (7 * j + n) % 90) for j in range(n)) for n in lengths]
    ten = write(tmp_path / "ten.jsonl", [{"text": text} for text in texts])
    words = (model, "--data", ten, "--stream", stream)
    isolated = observed(run, tmp_path / "isolated", *words, "--packing", "isolated")
    alone = observed(run, tmp_path / "alone", *words, "--packing", "none")
    concat = observed(run, tmp_path / "concat", *words)
    [facts], [single] = isolated.provenance["data"], alone.provenance["data"]
    assert (facts["packing"], facts["sequences"]) == ("isolated", 1)
    assert (single["packing"], single["seq_len"], single["sequences"]) == ("none", 256, 10)
    assert facts["tokens"] - single["tokens"] == 9
    for name, layer in alone.layers.items():
        separators = isolated.layers[name].count - layer.count
        assert int(separators.min()) >= 0
        assert int(separators.sum()) == 3 * 9
        assert int((concat.layers[name].count - layer.count).min()) < 0


@pytest.mark.parametrize("side", ["front", "behind", "middle"])
def test_masked_positions_are_as_if_they_were_not_there(
    run: Run, model: Path, tmp_path: Path, side: str
) -> None:
    """The kept sets come from the tokens that attention sees, and the mask is no field unused."""
    rows = [[(5 * j + n) % 250 for j in range(32)] for n in range(6)]
    plain = write(tmp_path / "plain.jsonl", [{"input_ids": ids} for ids in rows])
    at = {"front": 0, "behind": 32, "middle": 9}[side]
    padded = [
        {
            "input_ids": ids[:at] + [1] * 96 + ids[at:],
            "attention_mask": [1] * at + [0] * 96 + [1] * (32 - at),
        }
        for ids in rows
    ]
    data = f"plain={write(tmp_path / 'padded.jsonl', padded)}"
    mine = observed(run, tmp_path / "mine", model, "--data", data, "--seq-len", 128)
    theirs = observed(run, tmp_path / "theirs", model, "--data", plain, "--seq-len", 128)
    assert mine.provenance["data"][0]["digest"] == theirs.provenance["data"][0]["digest"]
    assert_close(mine, theirs, 0)


def test_sequences_packed_elsewhere_are_those_that_run(
    run: Run, model: Path, tmp_path: Path
) -> None:
    rows = [{"input_ids": [(5 * j + n) % 250 for j in range(128)]} for n in range(16)]
    words = ("observe", model, "--data", write(tmp_path / "a.jsonl", rows), "--seq-len", 128)
    done = run(*words, "--out", tmp_path / "out", "--json")
    assert done.json["tokens"] == 16 * 128
    [facts] = done.json["data"]
    assert (facts["sequences"], facts["separator"]) == (16, None)


def test_fields_that_nothing_is_made_of_are_named(
    run: Run, model: Path, tmp_path: Path, chats: Path
) -> None:
    """Beside a shape, in messages the template does not write, in columns of a table; once each."""
    rows = [json.loads(line) for line in chats.open()]
    for row in rows:
        row["messages"][1]["reasoning_content"] = "because"
        row |= {"prompt": "q", "id": 7}
    write(chats, rows)
    table = tmp_path / "table.parquet"
    parquet.write_table(pa.Table.from_pylist([{"text": "a", "summary": "b", "id": 1}] * 9), table)
    words = ("observe", model, "--data", chats, "--data", table, "--json")
    done = run(*words, "--out", tmp_path / "out")
    names = ["messages[].reasoning_content", "prompt"]
    assert f"note: {chats}: fields not used: {', '.join(names)}\n" in done.err
    assert f"note: {table}: fields not used: summary\n" in done.err
    assert done.err.count("fields not used") == 2
    assert [source["unused"] for source in done.json["data"]] == [names, ["summary"]]
    stats = rd.SaliencyStats.load(tmp_path / "out")
    assert [source["unused"] for source in stats.provenance["data"]] == [names, ["summary"]]


def test_models_that_pass_boundaries_are_refused_early(
    run: Run, documents: Path, tmp_path: Path
) -> None:
    """Before the data are read, in a dry run too."""
    model = write_model(tmp_path / "model", "qwen3_next")
    before = listing(tmp_path)
    for more in ((), ("--dry-run",)):
        words = ("--data", documents, "--packing", "isolated", "--out", tmp_path / "out", *more)
        done = run("observe", model, *words)
        assert done.code == 3
        assert "qwen3_next cannot keep documents packed in one sequence apart" in done.error
        assert listing(tmp_path) == before


@pytest.mark.parametrize("padded", [True, False])
def test_documents_are_padded_only_where_that_changes_nothing(
    run: Run, documents: Path, tmp_path: Path, padded: bool
) -> None:
    """One after the other or many at once; sparse attention gets rows of one length."""
    model = write_model(tmp_path / "model", "qwen3_moe" if padded else "deepseek_v32")
    words = (model, "--data", documents, "--packing", "none")
    many = observed(run, tmp_path / "many", *words, "--batch-size", 8, "--folds", 1)
    few = observed(run, tmp_path / "few", *words, "--max-len", 40, "--batch-size", 1)
    assert_close(many, few, 1e-4)


def test_long_documents_are_cut_and_it_is_said(
    run: Run, model: Path, documents: Path, tmp_path: Path
) -> None:
    words = ("observe", model, "--data", documents, "--packing", "none", "--max-len", 16)
    done = run(*words, "--out", tmp_path / "out")
    lengths = [len(json.loads(line)["input_ids"]) for line in documents.open()]
    long = sum(length > 16 for length in lengths)
    assert f"{long} of 25 records were cut to 16 tokens" in done.err
    [facts] = rd.SaliencyStats.load(tmp_path / "out").provenance["data"]
    assert facts["truncated"] == long
    assert facts["tokens"] == sum(min(length, 16) for length in lengths)


def test_answers_alone_are_counted(run: Run, model: Path, chats: Path, tmp_path: Path) -> None:
    """Their letters are: a byte is a token."""
    words = ("observe", model, "--data", chats, "--answers-only", "--seq-len", 32)
    done = run(*words, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    stats = rd.SaliencyStats.load(tmp_path / "out")
    [facts] = stats.provenance["data"]
    answers = sum(6 * i for i in range(1, 9))
    assert answers <= facts["counted_tokens"] < facts["tokens"]
    for layer in stats.layers.values():
        assert int(layer.tokens.sum()) == facts["counted_tokens"]
        assert int(layer.count.sum()) == 3 * facts["counted_tokens"]
    group = done.json["group_data"]["chats"]
    assert group["counted_tokens"] == facts["counted_tokens"]
    whole = observed(run, tmp_path / "whole", model, "--data", chats, "--seq-len", 32)
    assert int(whole.layers.popitem()[1].tokens.sum()) == facts["tokens"]
    told = run(*words, "--out", tmp_path / "again").out
    assert f"; {facts['counted_tokens']} counted" in told


def test_blocks_that_take_no_mask_are_refused_answers_alone(
    run: Run, model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the data are read."""
    from reap_driver.model.adapters.stacked import StackedExperts

    monkeypatch.setattr(StackedExperts, "takes_mask", False)
    words = ("observe", model, "--data", chats, "--out", tmp_path / "out")
    done = run(*words, "--answers-only")
    assert done.code == 3
    assert "a layer of it routes inside its block, so that no token can be left out" in done.error
    assert run(*words, "--packing", "none", "--batch-size", 8).code == 0  # rows of one length


def test_thinking_is_the_templates_business(run: Run, model: Path, tmp_path: Path) -> None:
    """Three ways to call one that knows it."""
    text = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}" + TEMPLATE
    (model / "chat_template.jinja").write_text(text)
    data = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    counts = []
    for number, option in enumerate(((), ("--enable-thinking",), ("--no-enable-thinking",))):
        stats = observed(run, tmp_path / f"{number}", model, "--data", data, *option)
        counts.append(stats.provenance["data"][0]["tokens"])
    assert [count - counts[0] for count in counts] == [0, len("True"), len("False")]


def test_a_given_chat_template_is_used_and_recorded(
    run: Run,
    model: Path,
    chats: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (model / "chat_template.jinja").unlink()
    words = ("observe", model, "--data", data, "--data", chats, "--out", tmp_path / "none")
    tokenized: list[object] = []
    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "encode", lambda *given: tokenized.append(given))
        refused = run(*words)
    assert refused.code == 3
    assert tokenized == []  # nothing of the first source either
    assert "chats.jsonl:1: is a conversation, but the tokenizer of" in refused.error
    assert "give one with --chat-template" in refused.error
    given = tmp_path / "other.jinja"
    given.write_text(TEMPLATE)
    stats = observed(run, tmp_path / "out", model, "--data", chats, "--chat-template", given)
    [source] = stats.provenance["data"]
    assert source["chat_template"] == f"sha256:{hashlib.sha256(given.read_bytes()).hexdigest()}"
    given.write_text("{% if %}")
    broken = run(*words, "--chat-template", given)
    assert broken.code == 3
    assert "other.jinja cannot be used for conversations (line 1: " in broken.error
    assert broken.error.count("\n") == 0


def test_recipes_and_data_are_one_mix(
    run: Run, model: Path, data: Path, documents: Path, tmp_path: Path
) -> None:
    """The recipe's first; a budget of tokens is kept; what each group is made of is told."""
    recipe = tmp_path / "mix.json"
    sources = [{"source": documents.name, "group": "ids", "tokens": 100}]
    recipe.write_text(json.dumps({"sources": sources}))
    words = ("observe", model, "--recipe", recipe, "--data", f"{data}:7", "--seq-len", 16)
    done = run(*words, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    stats = rd.SaliencyStats.load(tmp_path / "out")
    assert stats.groups == ["ids", "code"]
    ids, code = stats.provenance["data"]
    assert (ids["tokens"], ids["asked"]) == (100, {"tokens": 100})
    assert (code["records"], code["asked"]) == (7, {"samples": 7})
    share = 100 / (100 + code["tokens"])
    assert done.json["group_data"]["ids"] == {
        "records": ids["records"],
        "sequences": 7,
        "tokens": 100,
        "counted_tokens": 100,
        "skipped": 0,
        "share": share,
    }
    text = run(*words, "--out", tmp_path / "again").out
    line = f"ids: 100 tokens of {ids['records']} records in 7 sequences, {share:.1%} of all"
    assert line in text


def test_bad_records_end_the_run_or_are_counted(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.write('{"text": \n{"body": 1}\n')
    words = ("observe", model, "--data", data, "--out", tmp_path / "out")
    refused = run(*words)
    assert refused.code == 3
    assert "code.jsonl:31: is not JSON" in refused.error
    done = run(*words, "--skip-bad")
    assert done.code == 0, done.err
    assert "2 bad records were left out, first " in done.err
    assert "code.jsonl:31: is not JSON" in done.err
    assert "; 2 bad records left out" in " ".join(done.out.split())
    [facts] = rd.SaliencyStats.load(tmp_path / "out").provenance["data"]
    assert (facts["records"], facts["skipped"], len(facts["skipped_first"])) == (30, 2, 2)


HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "surrogate": ("a.jsonl", b'{"text": "a \\ud800"}', "a.jsonl:1: holds a text that no encoding"),
    "deep": ("a.jsonl", b'{"text": "a", "b": ' + b"[" * 10**5, "a.jsonl:1: is nested deeper than"),
    "zero": ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "ZeroDivisionError"),
    "lines": ("a.jsonl.gz", gzip.compress(b"\n" * 10**7), "has more than 1048576 bytes of empty"),
    "line": (
        "a.jsonl.bz2",
        bz2.compress(b"a" * 2 * 10**7),
        "a.jsonl.bz2:1: is larger than 16777216",
    ),
    "table": ("a.parquet", b"PAR1" * 9, "a.parquet cannot be read as Parquet"),
    "aliases": ("a.yaml", b"- &a [*a]", "a.yaml has the anchor or alias 'a'"),
    "name": ("a.yaml", b"- {source: %s}" % (b"x" * 300), "source 1: no file or folder"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_data_are_one_error(run: Run, model: Path, tmp_path: Path, case: str) -> None:
    name, content, says = HOSTILE[case]
    (model / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    path = tmp_path / name
    path.write_bytes(content)
    option = "--recipe" if name.endswith("yaml") else "--data"
    done = run("observe", model, option, path, "--dry-run")
    assert done.code == 3
    assert says in done.error


def test_folds_are_parts_of_what_one_run_observes(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    words = (model, "--data", data, "--seq-len", 32, "--batch-size", 1)
    plain = observed(run, tmp_path / "1", *words, "--folds", 1)
    assert plain.parts == []
    assert plain.provenance["data"][0]["folds"] == 1
    for more, folds in (((), 8), (("--folds", 3), 3)):
        stats = observed(run, tmp_path / f"{folds}-{len(more)}", *words, *more)
        assert len(stats.parts) == folds == stats.provenance["data"][0]["folds"]
        assert_close(stats, plain, 1e-12)
        for name, layer in stats.layers.items():
            counts = sum(part.layers[name].counts for part in stats.parts)
            assert torch.equal(counts, layer.counts)


def test_a_resumed_run_refuses_another_division(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reap_driver.observation.observer import Observer

    calls, call = [0], Observer.__call__

    def fail(self: Observer, **batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError("a power cut")
        return call(self, **batch)

    words = ("observe", model, "--data", data, "--seq-len", 32, "--journal-every", 1)
    words = (*words, "--out", tmp_path / "out")
    monkeypatch.setattr(Observer, "__call__", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        run(*words)
    monkeypatch.setattr(Observer, "__call__", call)
    for more, says in (
        (("--folds", 4), "folds was 8, now it is 4"),
        (("--packing", "isolated"), "packing was"),
    ):
        refused = run(*words, *more, "--resume")
        assert refused.code == 3
        assert says in refused.error
    assert run(*words, "--resume").code == 0
    whole = observed(run, tmp_path / "whole", *words[1:-2], "--no-journal")
    for mine, theirs in zip(
        rd.SaliencyStats.load(tmp_path / "out").parts, whole.parts, strict=True
    ):
        for name, layer in mine.layers.items():
            assert torch.equal(layer.sums, theirs.layers[name].sums)


def test_tokens_are_kept_for_the_next_run(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless nothing is to be kept; with the same statistics."""
    monkeypatch.setenv("REAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("reap_driver.data.token_cache._WORTH", 0.0)
    words = (model, "--data", data, "--batch-size", 1)
    plain = observed(run, tmp_path / "plain", *words, "--no-cache")
    assert not (tmp_path / "cache").exists()
    first = observed(run, tmp_path / "first", *words)
    assert len(list((tmp_path / "cache/tokens").glob("*.safetensors"))) == 1

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("tokenized again")

    monkeypatch.setattr("reap_driver.data.token_cache.pack", never)
    again = observed(run, tmp_path / "again", *words)
    assert run("observe", *words, "--dry-run").code == 0
    for stats in (first, again):
        assert stats.provenance["data"] == plain.provenance["data"]
        assert_close(stats, plain, 0)


@pytest.mark.parametrize("packing", ["concat", "isolated", "none"])
def test_a_dry_run_counts_as_the_run_does(
    run: Run, model: Path, documents: Path, data: Path, tmp_path: Path, packing: str
) -> None:
    words = (model, "--data", documents, "--data", f"{data}:99tok", "--packing", packing)
    done = run("observe", *words, "--dry-run", "--json").json
    stats = observed(run, tmp_path / "out", *words)
    assert done["data"]["tokens"] == sum(s["tokens"] for s in stats.provenance["data"])
    assert "code: 99 tokens of " in run("observe", *words, "--dry-run").out


USAGE = {
    "max-len": (("--data", "d", "--max-len", "9"), "--max-len 9: only with --packing none; packed"),
    "seq-len": (
        ("--data", "d", "--packing", "none", "--seq-len", "9"),
        "--seq-len 9: not together with --packing none, where",
    ),
    "packing": (("--data", "d", "--packing", "tight"), "--packing: invalid choice: 'tight'"),
    "folds": (("--data", "d", "--folds", "0"), "'0' is not a whole number above 0"),
    "tokens": (
        ("--dry-run", "--tokens", "9", "--recipe", "reap-coding"),
        "--tokens 9: not together with --recipe, whose tokens are counted",
    ),
}


@pytest.mark.parametrize("command", ["observe", "prune"])
@pytest.mark.parametrize("case", USAGE)
def test_usage(run: Run, command: str, case: str) -> None:
    words, says = USAGE[case]
    done = run(command, "model", *words, "--out", "out")
    assert done.code == 2
    assert says in " ".join(done.err.split())


def test_options_of_a_recipe_are_taken_said_and_recorded(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        "options: {packing: none, max_len: 20, ratio: 0.25}\n"
        f"sources: [{{source: {data.name}, samples: 8}}]\n"
    )
    words = ("observe", model, "--recipe", recipe, "--out", tmp_path / "out")
    done = run(*words)
    assert done.code == 0, done.err
    assert f"note: from recipe {recipe}: --packing none, --max-len 20\n" in done.err
    assert f"recipe {recipe} also has --ratio 0.25, which observe has no use for" in done.err
    [source] = rd.SaliencyStats.load(tmp_path / "out").provenance["data"]
    assert (source["packing"], source["seq_len"], source["records"]) == ("none", 20, 8)
    digest = hashlib.sha256(recipe.read_bytes()).hexdigest()
    assert source["recipe"] == {"name": str(recipe), "digest": f"sha256:{digest}"}
    done = run(*words, "--max-len", 10, "--overwrite")
    assert f"recipe {recipe} has --max-len 20; this run has --max-len 10" in done.err
    pruned = run("prune", model, "--recipe", recipe, "--out", tmp_path / "small", "--json")
    assert pruned.code == 0, pruned.err
    assert rd.Plan.load(tmp_path / "small" / "reap" / "plan.json").ratio == 0.25
    card = (tmp_path / "small" / "README.md").read_text()
    assert "mix.yaml" in card
    assert digest in card
    refused = run(*words, "--seq-len", 16, "--overwrite")
    assert refused.code == 2
    assert "--seq-len 16: not together with --packing none" in refused.error
    assert f"(with --packing none of recipe {recipe}, unless another is given)" in refused.error


def test_recipes_are_listed_checked_and_printed(run: Run, tmp_path: Path) -> None:
    done = run("recipe")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == rd.recipe_names()
    assert all(len(line) <= 80 for line in done.out.splitlines())
    listed = run("recipe", "--json").json["recipes"]
    one = run("recipe", "reap-coding", "--json").json
    assert {"command": "recipe", **listed[1]} == one
    assert one["options"]["max_len"] == 16384
    assert one["sources"][0] == {
        "source": "theblackcat102/evol-codealpaca-v1",
        "group": "code",
        "samples": 700,
    }
    # What is printed can be saved, and is the same recipe.
    copy = tmp_path / "copy.yaml"
    copy.write_text(run("recipe", "reap-coding").out)
    assert run("recipe", copy, "--json").json["digest"] == one["digest"]
    for name, says in {
        "reap-codin": "recipe 'reap-codin': no such file (did you mean reap-coding?); give a .yaml",
        tmp_path / "typo.yaml": "typo.yaml, options: seqlen is no option of any job; did you mean",
    }.items():
        (tmp_path / "typo.yaml").write_text("options: {seqlen: 5}\nsources: [{source: o/n}]")
        refused = run("recipe", name)
        assert refused.code == 3
        assert says in refused.error


def test_a_recipe_that_is_not_there(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("observe", model, "--recipe", tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert done.code == 3
    assert "none.yaml': no such file; give a .yaml or .json file, or one of " in done.error


def test_sequences_longer_than_the_model_reads(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    words = ("--data", data, "--packing", "none", "--max-len", 257, "--out", tmp_path / "out")
    done = run("observe", model, *words)
    assert done.code == 3
    assert "--max-len 257 is longer than the 256 positions" in done.error
