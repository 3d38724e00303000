"""The model card, parsed: its numbers against the models and the run, and its code run as it is."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

from reap_driver.checkpoint import apply_plan
from reap_driver.checkpoint.report import ApplyReport
from reap_driver.checkpoint.specification import specify
from reap_driver.compat.models import load_config, meta_model
from reap_driver.discover import find_moe_layers
from reap_driver.loading import load_model
from reap_driver.sizing.model import model_sizes
from tests.driver import zoo
from tests.driver.checkpoint import saved
from tests.driver.published.checkpoint import write_tokenizer

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
    assert [entry["source"] for entry in mix] == ["code.jsonl", "acme/tools[x](train)"]
    assert [entry["tokens"] for entry in mix] == ["3,000", "1,000"]
    assert [entry["records"] for entry in mix] == ["30", "7"]
    assert [entry["share of tokens"] for entry in mix] == ["75.0 %", "25.0 %"]
    assert [entry["digest of the tokens"] for entry in mix] == ["`sha256:aa`", "`sha256:bb`"]
    assert "4,000 tokens in all" in card
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


def test_the_licence_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("---\nlicense: other\nlicense_name: acme-1\n---\n")
    card, _ = write(tmp_path)
    assert "[acme/tiny](https://huggingface.co/acme/tiny) applies: acme-1." in card


def test_a_source_without_a_licence_names_none(tmp_path: Path) -> None:
    card, _ = write(tmp_path)
    assert "its card names none" in card
