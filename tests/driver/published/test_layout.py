"""The fixtures themselves: published fields and tensor names, and transformers loads them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.load.resident import load_model
from reap_driver.model.discover import find_moe_layers
from tests.driver.published.checkpoint import is_mtp
from tests.driver.published.expected import dequantized, read_tensors
from tests.driver.published.models import MODELS
from tests.driver.published.reduce import get_field, published_config, small_config

# MoE layers, and parameters in billions as the publisher's name or card gives them.
FULL_SIZE = {
    "qwen1.5-moe-a2.7b": (24, 14.3),
    "qwen3-30b-a3b": (48, 30.5),
    "qwen3-coder-480b-a35b": (62, 480),
    "qwen3.5-397b-a17b": (60, 397),
    "glm-4.5-air": (45, 106),
    "glm-4.7": (89, 355),
    "glm-4.7-flash": (46, 30),
    "glm-5": (75, 744),
    "deepseek-r1": (58, 671),
    "deepseek-v3.2": (58, 671),
    "kimi-k2": (60, 1000),
    "kimi-linear-48b-a3b": (26, 48),
    "minimax-m2": (62, 230),
    "step-3.5-flash": (42, 196),
    "gpt-oss-120b": (36, 117),
    "gemma-4-26b-a4b": (30, 26),
    "llama-4-scout-17b-16e": (48, 109),
    "mixtral-8x7b": (32, 46.7),
    "ernie-4.5-21b-a3b": (27, 21),
    "olmoe-1b-7b": (16, 7),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_config_describes_the_published_model(name: str, tmp_path: Path) -> None:
    """Built at full size without memory; a wrong or unread field would show in the size."""
    (tmp_path / "config.json").write_text(json.dumps(published_config(name)))
    model = meta_model(load_config(tmp_path))
    tied = set(model.all_tied_weights_keys)
    size = sum(p.numel() for key, p in model.named_parameters() if key not in tied)
    layers = find_moe_layers(model)
    depth, billions = FULL_SIZE[name]
    assert len(layers) == depth
    assert size == pytest.approx(billions * 1e9, rel=0.05)
    entry, config = MODELS[name], published_config(name)
    assert {layer.num_experts for layer in layers} == {get_field(config, entry.counts[0])}
    assert {layer.top_k for layer in layers} == {get_field(config, entry.top_k)}


@pytest.mark.parametrize("name", MODELS)
def test_small_config_keeps_what_routing_depends_on(name: str) -> None:
    entry, published, small = MODELS[name], published_config(name), small_config(name)
    routing = (
        *entry.counts,
        entry.top_k,
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "scoring_func",
    )
    for field in routing:
        assert get_field(small, field) == get_field(published, field)
    experts = get_field(small, entry.counts[0])
    assert entry.kept == experts - int(experts * entry.ratio)
    assert len(entry.moe_layers) >= 2


@pytest.mark.parametrize("name", MODELS)
def test_published_layout_loads(name: str, checkpoint: Callable[[str], Path]) -> None:
    """Every published tensor except those of MTP layers is read; no tensor of the model
    stays random.
    """
    entry, config, folder = MODELS[name], small_config(name), checkpoint(name)
    tensors = read_tensors(folder)
    assert set(entry.names) <= tensors.keys()
    if entry.quantized == "fp8":
        assert any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values())
    cls = getattr(transformers, config["architectures"][0], None)
    if cls is None or entry.not_plain:
        model = load_model(folder)  # refuses missing tensors and unknown experts by itself
    else:
        model, loading = cls.from_pretrained(str(folder), output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["mismatched_keys"]
        assert all(is_mtp(key, entry, config) for key in loading["unexpected_keys"])
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", [n for n, entry in MODELS.items() if entry.quantized == "fp8"])
def test_fp8_matrices_load_as_stored_times_scale(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """Also if the last block of 128 rows or columns is partial."""
    folder = checkpoint(name)
    tensors, parameters = read_tensors(folder), dict(load_model(folder).named_parameters())
    scaled = {key.removesuffix("_scale_inv") for key in tensors if key.endswith("_scale_inv")}
    loaded = scaled & parameters.keys()  # not the experts, which are stacked, nor MTP layers
    assert any("self_attn" in key for key in loaded)
    values = dequantized(tensors)
    for key in loaded:
        assert torch.equal(parameters[key], values[key].bfloat16()), key
