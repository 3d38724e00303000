"""Resolving, digesting and loading models; each damaged checkpoint gives a clear error."""

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
    initialization,
)

from reap_driver.compat.config_texts import without_texts
from reap_driver.compat.model_config import config_digest, load_config
from reap_driver.compat.pretrained import meta_model, model_class
from reap_driver.compat.text_model import text_model
from reap_driver.load.resident import load_model
from reap_driver.model.discover import find_moe_layers
from reap_driver.model.expert_dims import stacks_of
from reap_kernels.errors import CheckpointError, UnsupportedModel
from tests.driver import zoo

# Saved layouts that differ: per-expert keys, fused, text model of its own class, nested configs.
NAMES = ["qwen3_moe", "gpt_oss", "step3p7", "qwen3_vl_moe", "deepseek_v3", "dbrx"]


def _saved(folder: Path, name: str = "qwen3_moe", shard: str = "50GB", **fields: Any) -> Path:
    model = zoo.tiny(name, **fields)[1]
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def _edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_models_built_by_two_threads_leave_the_library_as_it_was(monkeypatch) -> None:
    """What it replaces meanwhile, it replaces for all threads: one goes after the other."""
    both = threading.Event()
    inside: list[int] = []
    own, before = initialization.no_init_weights, PreTrainedModel.init_weights

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        inside.append(1)
        if len(inside) == 2:
            both.set()
        with own():
            yield

    class Waiting(Qwen3MoeForCausalLM):
        def __init__(self, config: PretrainedConfig) -> None:
            both.wait(0.5)  # the first gives the second time to come inside
            super().__init__(config)

    monkeypatch.setattr(initialization, "no_init_weights", counted)
    config = zoo.tiny("qwen3_moe")[0]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: meta_model(config, Waiting), range(2))
    assert PreTrainedModel.init_weights is before
    assert type(first) is type(second) is Waiting


def test_configurations_keep_their_text(tmp_path: Path) -> None:
    """Which is shortened only while they are built, also if that fails."""
    folder = _saved(tmp_path)
    with without_texts():
        assert repr(load_config(folder)) == "Qwen3MoeConfig"
    assert '"num_experts_per_tok": 3' in repr(load_config(folder))
    _edit(folder, vocab_size="many")
    with pytest.raises(CheckpointError, match="vocab_size"):
        load_config(folder)
    assert PretrainedConfig.__repr__(PretrainedConfig()).startswith("PreTrainedConfig {")


@pytest.mark.parametrize("name", NAMES)
def test_digest_and_weights_survive_saving(name: str, tmp_path: Path) -> None:
    """In memory, saved and reloaded: one digest, the same class, the same logits."""
    config, model = zoo.tiny(name)
    folder = _saved(tmp_path, name)
    digest = config_digest(config)
    assert digest.startswith("sha256:")
    assert config_digest(load_config(folder)) == digest
    loaded = load_model(folder)
    assert config_digest(loaded.config) == digest
    assert type(loaded) is type(model)
    assert not loaded.training
    inputs = zoo.tiny_inputs(name, config)
    with torch.no_grad():
        got, wanted = (text_model(one)(**inputs).logits for one in (loaded, model))
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", zoo.names())
def test_meta_model_has_the_same_layers(name: str) -> None:
    """Built without memory: all tensors on meta, the same MoE layers as the real model."""
    config, model = zoo.tiny(name)
    config.architectures = [type(model).__name__]
    try:
        layers = find_moe_layers(model)
    except UnsupportedModel:
        pytest.skip("refused on this transformers version, which test_architectures checks")
    meta = meta_model(config)
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    facts = [(layer.name, layer.provenance()) for layer in layers]
    assert [(layer.name, layer.provenance()) for layer in find_moe_layers(meta)] == facts
    # One field counts all of them, but in a model that is made of several.
    stacks = stacks_of(meta, {layer.name: layer.num_experts for layer in layers})
    assert [name for stack in stacks for name in stack.layers] == [name for name, _ in facts]
    assert [stack.field.partition("_")[0] for stack in stacks if len(stacks) > 1] == (
        ["thinker", "talker"] if name == "qwen3_omni_moe_whole" else []
    )
    assert all(stack.sites for stack in stacks)


def test_digest_tells_models_apart() -> None:
    """Another number of experts is another model; another dtype, cache or quantization is not."""
    config, _ = zoo.tiny("qwen3_moe")
    other, _ = zoo.tiny("qwen3_moe", num_experts=16)
    assert config_digest(config) != config_digest(other)
    same = copy.deepcopy(config)
    same.dtype = torch.bfloat16
    same.use_cache = False
    same.quantization_config = {"quant_method": "fp8"}
    same.architectures = ["Qwen3MoeForCausalLM"]
    assert config_digest(config) == config_digest(same)


def test_unknown_model_type_resolves_by_architecture(tmp_path: Path) -> None:
    """Kimi-K2: transformers does not know its model_type, but its architecture."""
    folder = _saved(tmp_path, "deepseek_v3")
    digest = config_digest(load_config(folder))
    _edit(folder, model_type="kimi_k2")
    config = load_config(folder)
    assert model_class(config).__name__ == "DeepseekV3ForCausalLM"
    assert config_digest(config) == digest
    assert find_moe_layers(load_model(folder))


def test_unknown_architecture(tmp_path: Path) -> None:
    """If neither is known, the error names both, and the remedy for remote code."""
    folder = _saved(tmp_path)
    _edit(folder, model_type="novel", architectures=["NovelForCausalLM"])
    with pytest.raises(UnsupportedModel, match="'novel' with architecture 'NovelForCausalLM'"):
        load_config(folder)
    _edit(folder, auto_map={"AutoConfig": "novel.NovelConfig"})
    with pytest.raises(UnsupportedModel, match="`trust_remote_code=True`"):
        load_config(folder)


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _drop_shard(folder: Path) -> None:
    _shards(folder)[0].unlink()


def _truncate(folder: Path) -> None:
    path = _shards(folder)[0]
    _cut(path, path.stat().st_size - 100)


def _truncate_header(folder: Path) -> None:
    _cut(_shards(folder)[0], 5)


def _break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def _escape(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../outside.safetensors"
    path.write_text(json.dumps(index))


def _change_tensors(folder: Path, change: Any) -> None:
    for path in _shards(folder):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def _drop_tensor(folder: Path) -> None:
    _change_tensors(folder, lambda t: t.pop("model.layers.1.mlp.gate.weight", None))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.1.mlp.gate.weight"]
    path.write_text(json.dumps(index))


def _extra_expert(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if "model.layers.1.mlp.gate.weight" in tensors:
            tensors["model.layers.1.mlp.expert_scales"] = torch.ones(8)

    _change_tensors(folder, change)


def _other_shape(folder: Path) -> None:
    _edit(folder, hidden_size=48)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_of_words(folder: Path) -> None:
    (folder / "config.json").write_text("not json")


def _config_of_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _field_of_wrong_type(folder: Path) -> None:
    _edit(folder, num_hidden_layers="two")


def _no_weights(folder: Path) -> None:
    for path in [*_shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_shard, r"model-00001-of-.*missing, though .* names it; download it again"),
        (_truncate, r"model-00001-of-.*damaged or truncated: .* but the file has \d+ bytes"),
        (_truncate_header, r"damaged or truncated: it has 5 bytes"),
        (_break_index, r"index\.json: not readable JSON"),
        (
            _escape,
            r"places .* in '\.\./outside\.safetensors', which is not a .* inside the folder",
        ),
        (_drop_tensor, r"missing from the checkpoint, first model\.layers\.1\.mlp\.gate\.weight"),
        (_extra_expert, r"unknown to the model, first model\.layers\.1\.mlp\.expert_scales"),
        (
            _other_shape,
            r"another shape than config\.json says, first .* \(\[.*32.*\] instead of \[.*48",
        ),
        (_no_config, r"no config\.json there"),
        (_config_of_words, r"config\.json: is not JSON"),
        (_config_of_a_list, r"config\.json: holds a list"),
        (_field_of_wrong_type, r"num_hidden_layers.*expected a whole number"),
        (_no_weights, r"holds neither model.safetensors nor"),
    ],
)
def test_damaged_checkpoints(damage: Any, message: str, tmp_path: Path) -> None:
    """Each error is one line that names the file or field, and the remedy."""
    folder = _saved(tmp_path, shard="20KB")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "a/b/c"])
def test_missing_folder(path: str) -> None:
    """A path that does not exist is not taken for a Hub id."""
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_config(path)


def test_class_without_a_model() -> None:
    """A configuration no model class belongs to."""
    with pytest.raises(UnsupportedModel, match=r"architecture None \(PreTrainedConfig\)"):
        model_class(PretrainedConfig())
