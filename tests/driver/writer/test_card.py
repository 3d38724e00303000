"""The model card, parsed: its numbers against the models and the run, and its code run as it is."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.load.resident import load_model
from reap_driver.memory.model_sizes import model_sizes
from reap_driver.model.discover import find_moe_layers
from reap_driver.planning.plan import Plan
from reap_driver.writer.apply import apply_plan
from reap_driver.writer.card import inherited_fields, model_card
from reap_driver.writer.licenses import license_words
from reap_driver.writer.report import ApplyReport, specify
from tests.driver import zoo
from tests.driver.published.checkpoint import write_tokenizer
from tests.driver.writer import saved

DATA = [
    {"group": "code", "source": "/home/someone/data/code.jsonl", "records": 30, "tokens": 3000,
     "seq_len": 64, "packing": "concat", "digest": "sha256:aa"},
    {"group": "a|b", "source": "acme/tools[x](train)", "records": 7, "tokens": 1000,
     "seq_len": 64, "packing": "concat", "digest": "sha256:bb"},
]  # fmt: skip


def tables(card: str) -> dict[str, list[list[str]]]:
    """Section -> rows of its table, the headings first."""
    found = {}
    for part in card.split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        rows = [
            [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in text.splitlines()
            if line.startswith("|")
        ]
        found[title] = rows[:1] + rows[2:]
    return found


def code(card: str, language: str) -> str:
    """The first block of code in that language."""
    found = re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return found[1]


def write(folder: Path, choose: object = None, **changes: object) -> tuple[str, ApplyReport]:
    """Prunes a tiny model and returns its card with the report."""
    saved.save("qwen3_moe", folder / "full", vocab_size=259)
    write_tokenizer(folder / "full")
    model = meta_model(load_config(folder / "full"))
    options = {} if choose is None else {"choose": choose}
    plan = dataclasses.replace(saved.make_plan(folder / "full", model, **options), **changes)
    report = apply_plan(folder / "full", plan, folder / "out", non_uniform=choose is not None)
    return (folder / "out" / "README.md").read_text(), report


def test_the_specification_is_that_of_both_models(tmp_path: Path) -> None:
    card, report = write(tmp_path)
    rows = {row[0]: row[1:] for row in tables(card)["Specification"]}
    for column, folder in enumerate(("full", "out")):
        model = load_model(tmp_path / folder, dtype=torch.float32)
        config = model.config
        total = sum(p.numel() for p in model.parameters())
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        idle = experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts
        assert rows["parameters"][column].split()[0] == f"{total:,}"
        assert rows["parameters used for a token"][column].split()[0] == f"{total - idle:,}"
        assert rows["routed experts per layer"][column] == str(config.num_experts)
        assert rows["experts a token is routed to"][column] == str(config.num_experts_per_tok)
        assert rows["decoder layers"][column] == str(config.num_hidden_layers)
        assert rows["context length"][column] == str(config.max_position_embeddings)
        assert rows["stored as"][column] == "F32"
    assert rows["tensor bytes"] == [f"{report.source_tensor_bytes:,}", f"{report.tensor_bytes:,}"]
    assert rows["tensors"] == [f"{report.source_tensors:,}", f"{report.tensors:,}"]


@pytest.mark.parametrize("name", zoo.names())
def test_parameters_are_those_that_sizing_counts(name: str) -> None:
    _, model = zoo.tiny(name)
    layers = find_moe_layers(model)
    everything = {layer.name: layer.num_experts for layer in layers}
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    spec = specify(model, layers, everything, shapes, [], {})
    sizes = model_sizes(model, layers, dtype=torch.float32, seq_len=8)
    assert spec.parameters == (sizes.parameters, sizes.parameters)
    assert spec.active_parameters == (sizes.active_parameters, sizes.active_parameters)


def test_the_mix_has_proportions_and_no_paths(tmp_path: Path) -> None:
    card, _ = write(tmp_path, data=DATA)
    headings, *rows = tables(card)["Calibration data"]
    mix = [dict(zip(headings, row, strict=True)) for row in rows]
    assert [entry["group"] for entry in mix] == ["code", "a|b"]
    assert [entry["source"] for entry in mix] == ["code.jsonl", "`acme/tools[x](train)`"]
    assert [entry["tokens"] for entry in mix] == ["3,000", "1,000"]
    assert [entry["records"] for entry in mix] == ["30", "7"]
    assert [entry["share of tokens"] for entry in mix] == ["75.0 %", "25.0 %"]
    digests = card.partition("<details>")[2].partition("</details>")[0]
    assert "- tokens of code: `sha256:aa`\n- tokens of a|b: `sha256:bb`\n" in digests
    assert "4,000 tokens in all.\n" in card


def test_tokens_that_do_not_count_and_a_given_template_are_said(tmp_path: Path) -> None:
    """A run with --answers-only or --chat-template cannot be repeated without them."""
    counted = [{**DATA[0], "counted_tokens": 1200, "chat_template": "sha256:cc"}]
    card, _ = write(tmp_path, data=[*counted, {**DATA[1], "counted_tokens": 1000}])
    assert "4,000 tokens in all, of which the statistics count 2,200.\n" in card
    digests = card.partition("<details>")[2].partition("</details>")[0]
    assert "- chat template given for code: `sha256:cc`\n" in digests
    assert "given for a|b" not in digests
    assert "/home" not in card
    assert str(tmp_path) not in card


def test_a_plan_without_data_claims_none(tmp_path: Path) -> None:
    card, _ = write(tmp_path, data=[])
    assert "does not record which data" in card


def test_the_method_is_the_plan(tmp_path: Path) -> None:
    card, report = write(
        tmp_path,
        criterion="frequency",
        weights={"code": 0.7, "tools": 0.3},
        allocation="global",
        notes=["removes 3 | not 4"],
    )
    rows = {row[0]: row[1] for row in tables(card)["Method"]}
    assert rows["criterion"] == "`frequency`: `n, rows routed`"
    assert rows["allocation"] == "global"
    assert rows["note"] == "removes 3 | not 4"
    assert rows["weights of calibration groups"] == "code 0.7, tools 0.3"
    gone = sum(before - after for before, after in report.experts_per_layer.values())
    total = sum(before for before, _ in report.experts_per_layer.values())
    assert rows["experts removed"].startswith(f"{gone} of {total} ")
    assert "protected experts" not in rows


def test_protected_experts_are_counted(tmp_path: Path) -> None:
    card, _ = write(tmp_path, settings={"protected": {"a": [1, 2], "b": [3]}})
    assert ["protected experts", "3"] in tables(card)["Method"]


def test_its_code_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, report = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    loaded: dict[str, object] = {}
    exec(code(card, "python"), loaded)
    assert loaded["model"].config.num_experts == report.experts_after  # type: ignore[attr-defined]
    assert loaded["tokenizer"]("def").input_ids  # type: ignore[operator]
    assert code(card, "sh") == "vllm serve out\n"


def test_layers_that_differ_come_with_their_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, report = write(tmp_path, saved.differing())
    counts = [after for _, after in report.experts_per_layer.values()]
    [row] = [r for r in tables(card)["Specification"] if r[0] == "routed experts per layer"]
    assert row[2].startswith(f"{min(counts)} to {max(counts)} (")
    assert "vllm serve" not in card
    assert "the number of experts of every layer under `experts_per_layer`" in card
    assert "experts_per_layer.counts" not in card
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    loaded: dict[str, object] = {}
    exec(code(card, "python"), loaded)
    model: torch.nn.Module = loaded["model"]  # type: ignore[assignment]
    total = sum(p.numel() for p in model.parameters())
    [row] = [r for r in tables(card)["Specification"] if r[0] == "parameters"]
    assert row[2].split()[0] == f"{total:,}"


def test_the_license_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("---\nlicense: other\nlicense_name: acme-1\n---\n")
    card, _ = write(tmp_path)
    assert "[acme/tiny](https://huggingface.co/acme/tiny) applies: acme-1 (`other`)." in card


@pytest.mark.parametrize(
    ("fields", "files", "words"),
    [
        ({"license": "apache-2.0"}, [], "Apache License 2.0 (`apache-2.0`)"),
        ({"license": "mit"}, ["LICENSE"], "MIT License (`mit`); its text: `LICENSE`"),
        ({"license": ["mit", "acme"]}, [], "MIT License (`mit`), acme"),
        (
            {"license": "other", "license_name": "acme-1", "license_link": "https://a.b/c"},
            [],
            "acme-1 (`other`); its text: `https://a.b/c`",
        ),
        ({"license_name": "acme-1"}, [], "acme-1"),
        ({"tags": ["moe"]}, ["LICENSE"], None),
    ],
)
def test_licenses_in_words(fields: dict[str, object], files: list[str], words: str | None) -> None:
    assert license_words(fields, files) == words


def test_files_with_the_license_are_named(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "full" / "LICENSE.txt").write_text("all rights")
    card, _ = write(tmp_path)
    assert "applies: MIT License (`mit`); its text: `LICENSE.txt`." in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "all rights"


def test_how_the_statistics_were_made_is_said(tmp_path: Path) -> None:
    observed = {
        "device": "NVIDIA H200",
        "devices": 8,
        "memory_bytes": 150_754_820_096,
        "seconds": 4000.0,
        "seed": 42,
    }
    card, _ = write(tmp_path, observed=observed)
    rows = dict(tables(card)["Method"])
    assert rows["observed on"] == "8 x NVIDIA H200, 151 GB of memory each"
    assert (rows["observed in"], rows["seed of the samples"]) == ("1:06:40", "42")
    assert re.fullmatch(r"\d+\.\d s", rows["written in"])
    older, _ = write(tmp_path / "older")
    assert "observed on" not in dict(tables(older)["Method"])


def test_the_citation_is_that_of_the_project(tmp_path: Path) -> None:
    """All authors, in their order."""
    card, _ = write(tmp_path)
    known = yaml.safe_load((Path(__file__).parents[3] / "CITATION.cff").read_text())
    [paper] = known["references"]
    names = [f"{one['family-names']}, {one['given-names']}" for one in paper["authors"]]
    cited = code(card, "bibtex")
    assert f"author    = {{{' and '.join(names)}}}" in cited
    assert re.sub("[{}]", "", cited).count(paper["title"]) == 1
    assert f"{{{paper['year']}}}" in cited


def test_a_source_without_a_license_names_none(tmp_path: Path) -> None:
    card, _ = write(tmp_path)
    assert "its card names none" in card


BROKEN = {
    "no such date": "date: 2024-13-01\nlicense: !!timestamp 2024-13-01",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nlicense: mit\ntags: *b",
    "recursion": "license: &a [*a]",
    "nesting": "license: " + "[" * 5000,
    "unclosed": "license: [unclosed",
    "no fields": "- license",
    "surrogates": 'license: "\\ud800"',
    "twice": "license: mit\nlicense: other",
    "tag of a program": "license: !!python/object/apply:os.system [true]",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a card."""
    folder = tmp_path_factory.mktemp("card")
    saved.save("qwen3_moe", folder / "full", vocab_size=259)
    return folder / "full"


@pytest.mark.parametrize("front", BROKEN.values(), ids=BROKEN)
def test_a_broken_front_matter_is_left_out_and_said(source: Path, front: str) -> None:
    (source / "README.md").write_text(f"---\n{front}\n---\n")
    fields, note = inherited_fields(open_checkpoint(source))
    assert fields is None
    assert note is not None
    assert "README.md" in note
    assert "repeats no license and no tags" in note


def test_a_broken_card_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text(f"---\n{BROKEN['unclosed']}\n---\n")
    card, report = write(tmp_path)
    assert "applies; the front matter of its card cannot be read" in card
    assert sorted(yaml.safe_load(card.split("---")[1])) == ["base_model", "tags"]
    assert str(tmp_path) not in card
    note = report.warnings[-1]
    assert "README.md: is not YAML" in note


def test_of_a_front_matter_texts_are_repeated(source: Path) -> None:
    front = "date: 2024-13-01\nlicense: mit\nlanguage: [en, de]\npipeline_tag: {a: 1}\ntags: [1, x]"
    (source / "README.md").write_text(f"\n---\n{front}\n---\n")
    assert inherited_fields(open_checkpoint(source)) == (
        {"license": "mit", "language": ["en", "de"]},
        None,
    )


def test_what_a_link_leads_to_is_not_read(source: Path, tmp_path: Path) -> None:
    (tmp_path / "private.md").write_text("---\nlicense: secret\n---\n")
    (source / "README.md").unlink(missing_ok=True)
    (source / "README.md").symlink_to(tmp_path / "private.md")
    fields, note = inherited_fields(open_checkpoint(source))
    assert (fields, "is a symbolic link to" in str(note)) == (None, True)
    (source / "README.md").unlink()


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/pixel.png)",
    "http://evil.example",
    "www.evil.example",
    "someone@evil.example",
    "`</code><b>x</b>`",
    "``` ` ``<b>",
    "a\\|<b>x</b>",
    "a\\\\|[x](http://evil.example)",
    "x\n\n# Heading\n<b>",
    "__bold__ and *this*",
    "&lt;b&gt; &#60;",
    "$x$ ~~x~~ #1",
    "safe\u202egnp.exe\x1b[31m",
]


@pytest.fixture(scope="module")
def written(source: Path) -> tuple[Plan, ApplyReport]:
    """A plan and what applying it came to."""
    plan = saved.make_plan(source, meta_model(load_config(source)))
    return plan, apply_plan(source, plan, source.with_name("out"))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_elsewhere_do_nothing(written: tuple[Plan, ApplyReport], name: str) -> None:
    """Without blocks and spans of code, nothing of a name is left in the card."""
    plan, report = written
    changed = dataclasses.replace(
        plan,
        data=[{**DATA[0], "group": name, "source": name, "packing": name, "digest": name}],
        weights={name: 1.0},
        allocation=name,
        notes=[name],
        model={**plan.model, "id": name},
        scores_digest=name,
        observed={"device": name, "devices": 2},
    )
    given = {"license_name": name, "license": name, "license_link": name, "tags": [name]}
    card = model_card(given, changed, report)
    front, body = re.findall(r"\A---\n(.*?)^---\n(.*)", card, re.DOTALL | re.MULTILINE)[0]
    assert yaml.safe_load(front)["license_name"] == name
    inert = re.sub(r"</?(details|summary)>", "", outside_code(body))
    for word in ("<", "evil", "alert", "javascript", "**", "__", "Heading", "\u202e", "\x1b", "~~"):
        assert word not in inert
    assert {len(row) for row in cells(body)["Calibration data"]} == {7}


def outside_code(body: str) -> str:
    """A card as its renderer sees it, without blocks and spans of code."""
    lines = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE).splitlines()
    return "\n".join(re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", line) for line in lines)


def cells(body: str) -> dict[str, list[list[str]]]:
    """Section -> cells of its rows, as GitHub divides them: a backslash escapes what follows."""
    found: dict[str, list[list[str]]] = {}
    for part in body.split("\n## ")[1:]:
        title, _, section = part.partition("\n")
        rows = [line for line in section.splitlines() if line.startswith("|")]
        found[title] = [re.findall(r"((?:\\.|[^|\\])+)\|", row[1:]) for row in rows]
    return found
