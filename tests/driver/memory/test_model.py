"""Sizes of models: published totals from their configurations, exact bytes of loaded models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.load.resident import load_model
from reap_driver.memory.checkpoint_size import estimated, run_dtype, stored_files
from reap_driver.memory.model_sizes import ModelSizes, model_sizes, residual_streams
from reap_driver.model.discover import find_moe_layers
from reap_kernels.errors import CheckpointError, DataError
from tests.driver import zoo
from tests.driver.observation.test_architectures import NAMES
from tests.driver.published.checkpoint import write_checkpoint
from tests.driver.published.reduce import CONFIGS

BF16 = torch.bfloat16

# name: (parameters, active per token, both 1e9; GB on disk), as published on each model's card and
# as the sum of its files there, multi-token-prediction layers left out. Publishers count embeddings
# among the active or not, which is up to 1.2e9 here.
PUBLISHED = {
    "kimi-k2": (1026, 32.6, 1029),
    "deepseek-v3.2": (671, 37, 674),
    "glm-5": (744, 40, 1488),
    "qwen3-coder-480b-a35b": (480, 35, 960),
    "qwen3-30b-a3b": (30.5, 3.3, 61.1),
    "mixtral-8x7b": (46.7, 12.9, 93.4),
    "gpt-oss-120b": (116.8, 5.7, 65.2),
}


def published(name: str, folder: Path) -> PreTrainedModel:
    shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
    return meta_model(load_config(folder))


def sizes_of(model: PreTrainedModel, dtype: torch.dtype, seq_len: int = 2048) -> ModelSizes:
    return model_sizes(model, find_moe_layers(model), dtype=dtype, seq_len=seq_len)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str, tmp_path: Path) -> None:
    total, active, disk = PUBLISHED[name]
    model = published(name, tmp_path)
    sizes = sizes_of(model, BF16)
    assert sizes.parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert sizes.active_parameters / 1e9 == pytest.approx(active, rel=0.05)
    stored = estimated(model, model.config, BF16)
    assert stored.origin == "estimated"
    assert stored.nbytes / 1e9 == pytest.approx(disk, rel=0.005)
    assert sizes.weight_bytes == pytest.approx(2 * sizes.parameters, rel=0.001)
    text = model.config.get_text_config()
    assert len(sizes.layer_bytes) == text.num_hidden_layers
    # Two operations per active parameter except embeddings and head, plus those of attention.
    products = 2 * (sizes.active_parameters - 2 * text.vocab_size * text.hidden_size)
    assert products < sizes.flops_per_token < 1.2 * products


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_bytes_are_those_of_the_tensors(name: str, dtype: torch.dtype) -> None:
    """All weights in one dtype, except those that the class keeps in float32."""
    _, model = zoo.tiny(name)
    sizes = sizes_of(model, dtype, 16)
    tensors = [*model.parameters(), *model.buffers()]
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    if dtype == torch.float32:
        assert sizes.weight_bytes == sum(t.nbytes for t in tensors)
    else:
        assert sizes.weight_bytes >= sizes.parameters * 2
        assert sizes.weight_bytes < sum(t.nbytes for t in tensors)
    assert 0 < sizes.active_parameters < sizes.parameters


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_bytes_of_a_loaded_checkpoint_are_exact(name: str, tmp_path: Path) -> None:
    """Also if the library keeps a correction bias in float32."""
    _, model = zoo.tiny(name)
    model.to(BF16).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=BF16)
    sizes = sizes_of(meta_model(load_config(tmp_path)), BF16, 16)
    assert sizes.weight_bytes == sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers()))
    layers = loaded.model.layers
    assert sizes.layer_bytes == tuple(
        sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) for layer in layers
    )


def test_pairs_are_consecutive() -> None:
    sizes = ModelSizes("A", "bfloat16", (5, 9, 1, 8), 3, 0, 0, 1, 0, 2)
    assert (sizes.largest_layer, sizes.largest_pair, sizes.weight_bytes) == (9, 14, 26)
    assert ModelSizes("A", "bfloat16", (5,), 3, 0, 0, 1, 0, 2).largest_pair == 5


def test_operations_are_those_torch_counts() -> None:
    """Compared with torch's own counter, on sequences of one token: one attended position."""
    from torch.utils.flop_counter import FlopCounterMode

    _, model = zoo.tiny("mixtral", num_experts_per_tok=1, num_local_experts=4)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), logits_to_keep=1, use_cache=False)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    counted = counter.get_total_flops() - 2 * head.weight.numel()
    assert sizes_of(model, BF16, 1).flops_per_token == pytest.approx(counted, rel=0.01)


def test_attention_grows_with_the_sequence_until_the_window() -> None:
    config, model = zoo.tiny("mixtral")
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    width = getattr(config, "head_dim", None) or width
    at = {length: sizes_of(model, BF16, length).flops_per_token for length in (1, 101)}
    assert at[101] - at[1] == config.num_hidden_layers * 2 * heads * 2 * width * 50


def test_streams_of_hyper_connections() -> None:
    assert {name: residual_streams(zoo.tiny(name)[0].get_text_config()) for name in NAMES} == {
        **dict.fromkeys(NAMES, 1),
        **{name: streams(name) for name in ("deepseek_v4", "glm5_next", "hy_v4", "qwen4_exp")},
    }


def streams(name: str) -> int:
    """The state between two layers, relative to the model's width: by running the model."""
    config, model = zoo.tiny(name)
    seen = []
    layers = [m for n, m in model.named_modules() if n.endswith("layers.1")]
    hook = layers[-1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with hook, torch.no_grad():
        model(input_ids=torch.zeros(1, 8, dtype=torch.long))
    assert len(layers) == 1
    return int(seen[0].numel() // 8 // config.get_text_config().hidden_size)


@pytest.mark.parametrize("name", ["deepseek-v3.2", "gpt-oss-120b", "qwen3-30b-a3b"])
def test_files_are_exact_and_estimates_close(name: str, tmp_path: Path) -> None:
    """fp8, mxfp4 and unquantized; the estimate leaves out the multi-token-prediction layer."""
    folder = write_checkpoint(name, tmp_path / name)
    config = load_config(folder)
    files = stored_files(folder, config)
    assert files is not None
    assert files.origin == "headers"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    from safetensors import safe_open

    total, own = 0, 0
    for file in set(index["weight_map"].values()):
        with safe_open(str(folder / file), "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (safe_open is not iterable)
                nbytes = opened.get_tensor(key).nbytes
                total += nbytes
                layer = f"layers.{config.num_hidden_layers}."
                own += 0 if layer in key else nbytes
    assert files.nbytes == total
    guess = estimated(meta_model(config), config, BF16).nbytes
    assert guess == pytest.approx(own, rel=0.01)


def test_an_index_without_its_files(tmp_path: Path) -> None:
    published("qwen3-30b-a3b", tmp_path)
    config = load_config(tmp_path)
    assert stored_files(tmp_path, config) is None
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 77}, "weight_map": {"a": "b"}}))
    files = stored_files(tmp_path, config)
    assert files is not None
    assert (files.nbytes, files.origin, files.largest_file) == (77, "index", None)


def test_packed_int4(tmp_path: Path) -> None:
    """Within 0.01 bits: 4 bits and a 16-bit scale per 32 values, ignored modules unquantized."""
    model = published("kimi-k2", tmp_path)
    ignored = [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|down).*",
    ]
    weights = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True}
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignored,
    }
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    rest = sum(p.numel() for p in model.parameters()) - experts
    found = estimated(model, model.config, BF16).nbytes
    assert found == pytest.approx(experts * 4.5 / 8 + rest * 2, rel=1e-3)


@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt"])
def test_nvfp4(method: str, tmp_path: Path) -> None:
    """4 bits and an 8-bit scale per 16 values."""
    model = published("qwen3-30b-a3b", tmp_path)
    weights = {"num_bits": 4, "group_size": 16, "type": "float"}
    model.config.quantization_config = {
        "quant_method": method,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    }
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    rest = sum(p.numel() for p in model.parameters()) - experts
    found = estimated(model, model.config, BF16).nbytes
    assert found == pytest.approx(experts * 4.5 / 8 + rest * 2, rel=1e-3)


def test_unknown_quantization_is_refused(tmp_path: Path) -> None:
    model = published("qwen3-30b-a3b", tmp_path)
    model.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(
        CheckpointError, match=r"'gguf': the size of its weights .* give the folder"
    ):
        estimated(model, model.config, BF16)


def test_the_dtype_of_a_run(tmp_path: Path) -> None:
    config = published("minimax-m2", tmp_path).config
    assert run_dtype("float16", config, None) == torch.float16
    with pytest.raises(DataError, match=r"`dtype='auto'`: .* names no dtype.*`dtype='bfloat16'`"):
        run_dtype("auto", config, None)
    config.dtype = torch.float32
    assert run_dtype("auto", config, None) == torch.float32
