"""config.json and what is copied beside the weights: edited where it must be, otherwise as it
was.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from reap_driver.compat.config_edit import count_sites, with_count
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.writer.apply import apply_plan
from tests.driver.writer import saved


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.fixture
def full(tmp_path: Path) -> Path:
    saved.save("qwen3_moe", tmp_path / "full")
    return tmp_path / "full"


def apply(full: Path, out: Path, **options: Any) -> Any:
    return apply_plan(full, saved.make_plan(full, meta_model(load_config(full))), out, **options)


def test_published_alias_keeps_its_name_and_nothing_else_changes(
    full: Path, tmp_path: Path
) -> None:
    """Qwen3 publishes `num_experts`; save_pretrained would rename it and older readers miss it."""
    config = config_of(full)
    config["num_experts"] = config.pop("num_local_experts")
    config["some_vendor_field"] = {"num_experts_hint": 8, "nested": [1, 2]}
    (full / "config.json").write_text(json.dumps(config))
    report = apply(full, tmp_path / "out")
    assert config_of(tmp_path / "out") == {**config, "num_experts": 5}
    assert report.edited_config == {"num_experts": (8, 5)}


def test_every_alias_present_is_edited(full: Path, tmp_path: Path) -> None:
    saved.change_config(full, num_experts=8)
    apply(full, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["num_experts"], config["num_local_experts"]) == (5, 5)


def test_count_left_to_its_default_is_written(tmp_path: Path) -> None:
    """A config that relies on the class default gets the field."""
    saved.save("mixtral", tmp_path / "full")
    config = config_of(tmp_path / "full")
    assert config.pop("num_local_experts") == 8  # Mixtral's default
    (tmp_path / "full" / "config.json").write_text(json.dumps(config))
    apply(tmp_path / "full", tmp_path / "out")
    assert config_of(tmp_path / "out")["num_local_experts"] == 5


def test_lists_of_counts_keep_their_length() -> None:
    config = {"text_config": {"moe_num_experts": [64, 64]}, "num_experts": 12, "n_experts": True}
    sites = count_sites(config, 64)
    assert sites == [("text_config", "moe_num_experts")]
    assert with_count(config, sites, 48)["text_config"]["moe_num_experts"] == [48, 48]
    assert config["text_config"] == {"moe_num_experts": [64, 64]}


def test_quantization_entries_follow_their_expert(full: Path, tmp_path: Path) -> None:
    """Ignore lists and per-module settings name experts by index: renumbered, or dropped."""
    plan_layer = "model.layers.1.mlp.experts"
    names = [f"{plan_layer}.{i}.up_proj" for i in range(8)]
    escaped = [rf"re:model\.layers\.1\.mlp\.experts\.{i}\." for i in range(8)]
    settings = {"quant_method": "auto-round", "ignore": ["lm_head", *names, *escaped]}
    saved.change_config(
        full, quantization_config={**settings, "extra_config": {n: {"bits": 16} for n in names}}
    )
    (full / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"exclude_modules": names}})
    )
    plan = saved.make_plan(full, meta_model(load_config(full)))
    apply_plan(full, plan, tmp_path / "out")
    kept = plan.layers[plan_layer].kept
    result = config_of(tmp_path / "out")["quantization_config"]
    assert result["ignore"] == ["lm_head", *names[: len(kept)], *escaped[: len(kept)]]
    assert list(result["extra_config"]) == names[: len(kept)]
    beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert beside["quantization"]["exclude_modules"] == names[: len(kept)]


def test_small_files_travel_and_other_weights_do_not(full: Path, tmp_path: Path) -> None:
    travelling = {
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        "modeling_custom.py": b"x = 1",
        "additional_chat_templates/tools.jinja": b"y",
        "tokenizer.model": bytes(range(256)),
        "LICENSE": b"text",
    }
    staying = [
        "pytorch_model.bin",
        "model.gguf",
        "original/consolidated.00.pth",
        "stale-00009.safetensors",
    ]
    for name, content in travelling.items():
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_bytes(content)
    for name in staying:
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_bytes(b"weights")
    (full / ".git").mkdir()
    (full / ".git" / "config").write_text("private")
    report = apply(full, tmp_path / "out")
    out = tmp_path / "out"
    assert all((out / name).read_bytes() == content for name, content in travelling.items())
    assert not any((out / name).exists() for name in [*staying, ".git"])
    assert sorted(report.left_out) == sorted(staying)
    assert (out / "generation_config.json").read_bytes() == (
        full / "generation_config.json"
    ).read_bytes()
    present = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert report.bytes_written == present


def test_card_says_what_was_done(full: Path, tmp_path: Path) -> None:
    (full / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en]\ntags: [chat]\nextra: 1\n---\n# Old\n"
    )
    report = apply(full, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"
    assert front["language"] == ["en"]
    assert front["tags"] == ["chat", "moe", "pruned", "reap"]
    assert front["base_model"] == "acme/tiny"
    assert (
        f"| routed experts per layer | {report.experts_before} | {report.experts_after} |" in card
    )
    assert f"{report.tensor_bytes:,}" in card
    assert "2510.13999" in card
    assert "vllm serve" in card
