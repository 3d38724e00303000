"""config.json with values that no model can have: one error that names the file and the field."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig

from reap_driver.compat.library_errors import place_in_library, wrap_errors
from reap_driver.compat.model_config import quantization_settings
from reap_driver.compat.pretrained import read_model
from reap_driver.model.discover import find_moe_layers
from reap_kernels.errors import CheckpointError, ReapError, UnsupportedModel
from tests.driver.cli.conftest import VOCAB, Run, write_model
from tests.driver.zoo import _SPECS
from tests.driver.zoo.build import make_config

INF, NAN = float("inf"), float("nan")


def nested(depth: int) -> Any:
    """1 inside as many lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@cache
def original(architecture: str) -> str:
    spec = _SPECS[architecture]
    config = make_config(spec, {})
    return json.dumps({**json.loads(config.to_json_string()), "architectures": [spec.model]})


def write(folder: Path, architecture: str, field: str, value: Any, **others: Any) -> Path:
    """The architecture's config.json with another value of a (dotted) field."""
    raw = {**json.loads(original(architecture)), **others}
    *path, name = field.split(".")
    part = raw
    for step in path:
        part = part[step]
    part[name] = value
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# (architecture, field, value): sizes, names, types, and what only building a model finds.
WRONG = [
    *(("qwen3_moe", "num_hidden_layers", n) for n in (-1, 10**6, 2**62, "2", True, 1.5, NAN)),
    *(("qwen3_moe", "num_experts", n) for n in (-1, 10**9, 10**30, 0.5)),
    *(("qwen3_moe", "num_experts_per_tok", n) for n in (0, -3, 9)),
    *(("qwen3_moe", "hidden_size", n) for n in (0, -32, 10**12, [])),
    *(("qwen3_moe", "vocab_size", n) for n in (0, -1, 10**15, "96")),
    *(("qwen3_moe", "architectures", v) for v in (7, "Qwen3MoeForCausalLM", [7], [None], {"a": 1})),
    ("qwen3_moe", "moe_intermediate_size", 0),
    *(("qwen3_moe", "hidden_act", v) for v in ("no such", "", None)),
    *(("qwen3_moe", "dtype", v) for v in ("int8", "cat", 7, {"a": 1})),
    *(("qwen3_moe", "quantization_config", v) for v in (7, "fp8", {"quant_method": 7})),
    ("qwen3_moe", "quantization_config", {"quant_method": "fp8", "weight_block_size": [0, "x"]}),
    ("qwen3_moe", "decoder_sparse_step", 0),
    ("qwen3_moe", "num_attention_heads", 0),
    ("qwen3_moe", "rms_norm_eps", NAN),
    ("qwen3_moe", "rope_parameters.rope_theta", INF),
    ("qwen3_moe", "rope_parameters.rope_theta", -1.0),
    ("qwen3_moe", "experts_per_layer", {"count_fields": [7], "counts": {"a": 1}}),
    ("qwen3_moe", "experts_per_layer", {"count_fields": ["num_experts"], "counts": {"a": 10**9}}),
    ("deepseek_v3", "rope_parameters.rope_type", "no such"),
    ("deepseek_v3", "n_group", 3),
    ("deepseek_v3", "topk_group", 5),
    ("deepseek_v3", "pad_token_id", 10**6),
    ("deepseek_v3", "first_k_dense_replace", -1),
    ("gpt_oss", "num_local_experts", 0),
    ("gpt_oss", "num_experts_per_tok", 0),
    ("gpt_oss", "layer_types", ["full_attention", "no such"]),
    ("gemma4", "num_experts", None),
    ("gemma4", "top_k_experts", 0),
    ("ernie4_5_vl_moe", "vision_config.hidden_act", "no such"),
    ("ernie4_5_vl_moe", "text_config.moe_k", 0),
    ("ernie4_5_vl_moe", "text_config.moe_num_experts", 10**7),
    ("jamba", "attn_layer_period", 0),
    ("jamba", "mamba_d_state", -1),
    ("llama4", "no_rope_layers", 7),
    ("llama4", "num_experts_per_tok", 0),
    ("dbrx", "ffn_config.ffn_act_fn", {"name": "no such"}),
    ("dbrx", "attn_config.kv_n_heads", 0),
    ("nemotron_h", "mlp_hidden_act", "bfloat16"),
    ("qwen3_omni_moe", "vision_config.depth", 10**6),
    ("longcat_flash", "num_attention_heads", {"a": 1}),
]


@pytest.mark.parametrize(("architecture", "field", "value"), WRONG)
def test_values_no_model_can_have(
    architecture: str, field: str, value: Any, tmp_path: Path
) -> None:
    folder = write(tmp_path, architecture, field, value)
    with pytest.raises((CheckpointError, UnsupportedModel)) as caught:
        find_moe_layers(read_model(folder)[1])
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 900
    assert "config" in text


# What only building the model finds is traced to its field.
FOUND = [
    ("qwen3_moe", "decoder_sparse_step", 0),
    ("qwen3_moe", "hidden_act", "no such"),
    ("jamba", "mamba_d_state", -5),
    ("ernie4_5_vl_moe", "vision_config.hidden_act", "no such"),
    ("dbrx", "ffn_config", {"ffn_act_fn": {"name": "no such"}}),
    ("deepseek_v3", "pad_token_id", 10**6),
]


@pytest.mark.parametrize(("architecture", "field", "value"), FOUND)
def test_the_field_is_named(architecture: str, field: str, value: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, architecture, field, value)
    with pytest.raises(CheckpointError, match=rf"{folder}.*config\.json.*{field}"):
        read_model(folder)


FILES = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"7",
    "no UTF-8": b"\xff\xfe{}",
    "nested": b'{"a":' * 200 + b"1" + b"}" * 200,
    "nested beyond the parser": b"[" * 100_000,
    "twice": b'{"model_type": "a", "model_type": "b"}',
    "half a surrogate pair": b'{"model_type": "\\ud800"}',
    "thousands of digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_files_that_are_no_configuration(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json.*; restore the file"):
        read_model(tmp_path)


def test_messages_stay_short(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x" * 100_000}))
    with pytest.raises(UnsupportedModel) as caught:
        read_model(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("path", ["x" * 300 + "/y", "a\0b"])
def test_names_no_folder_has(path: str) -> None:
    with pytest.raises(CheckpointError):
        read_model(path)


def test_infinity_is_a_limit(tmp_path: Path) -> None:
    """Published Mamba configurations hold it."""
    _, meta = read_model(write(tmp_path, "nemotron_h", "time_step_limit", [0.0, INF]))
    assert find_moe_layers(meta)


@pytest.mark.parametrize("nesting", [70, 300])
def test_the_command_line_ends_in_one_line(run: Run, tmp_path: Path, nesting: int) -> None:
    folder = write(tmp_path, "qwen3_moe", "eos_token_id", nested(nesting))
    done = run("observe", folder / "config.json", "--dry-run", "--tokens", 4096)
    assert done.code == 3
    assert "config.json: is nested deeper than 64 levels" in done.error


def test_errors_of_our_own_pass() -> None:
    with pytest.raises(UnsupportedModel, match="mine"), wrap_errors("a", "b"):
        raise UnsupportedModel("mine")
    with pytest.raises(MemoryError), wrap_errors("a", "b"):
        raise MemoryError
    with pytest.raises(ReapError, match=r"a \(KeyError: 'x'\); b"), wrap_errors("a", "b"):
        raise KeyError("x")


TOKENIZERS = {
    "tokenizer.json": [b"[]", b"7", b'{"model": 7}', b'{"added_tokens": {"a": 1}}', b"[" * 5000],
    "tokenizer_config.json": [b"[]", b"7", b'{"tokenizer_class": 7}', b'{"pad_token": [7]}'],
    "special_tokens_map.json": [b"7"],
}
CASES = [(name, content) for name, contents in TOKENIZERS.items() for content in contents]


@pytest.mark.parametrize(("name", "content"), CASES)
def test_tokenizers_that_cannot_be_loaded(
    run: Run,
    model: Path,
    data: Path,
    name: str,
    content: bytes,
) -> None:
    (model / name).write_bytes(content)
    done = run("observe", model, "--data", data, "--seq-len", 16, "--dry-run")
    assert done.code in (0, 3)
    assert done.code == 0 or "tokenizer" in done.error


@pytest.mark.parametrize("content", [b"[]", b"7", b'{"max_length": "x"}', b"[" * 5000, b"\xff"])
def test_generation_settings_that_cannot_be_used(
    run: Run,
    model: Path,
    data: Path,
    content: bytes,
) -> None:
    (model / "generation_config.json").write_bytes(content)
    out = model.parent / "stats.safetensors"
    done = run("observe", model, "--data", data, "--seq-len", 16, "--out", out)
    assert done.code in (0, 3)
    assert done.code == 0 or "generation_config.json" in done.error


RUNS = {"resident": "never", "streamed": "always"}


@pytest.mark.parametrize("stream", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(
    "field", ["output_router_logits", "output_hidden_states", "output_attentions", "use_cache"]
)
def test_what_a_configuration_asks_to_be_returned(
    run: Run, model: Path, data: Path, field: str, stream: str
) -> None:
    """Training tools leave these set. Streamed, the loss of the routers found none of them."""
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: True}))
    out = model.parent / "stats.safetensors"
    done = run("observe", model, "--data", data, "--seq-len", 16, "--out", out, "--stream", stream)
    assert done.code == 0, done.err


@pytest.mark.parametrize("stream", RUNS.values(), ids=RUNS)
def test_what_only_running_the_model_finds(
    run: Run, tmp_path: Path, data: Path, stream: str
) -> None:
    folder = write_model(tmp_path / "llama4", "llama4")
    write(folder, "llama4", "attention_chunk_size", 0, vocab_size=VOCAB)
    out = tmp_path / "stats.safetensors"
    done = run("observe", folder, "--data", data, "--seq-len", 16, "--out", out, "--stream", stream)
    assert done.code == 3
    assert "the model cannot be run: transformers.masking_utils, line" in done.error
    assert not out.exists()


def test_errors_of_ours_are_no_error_of_the_library() -> None:
    with pytest.raises(TypeError) as caught:
        MixtralConfig.from_dict(7)
    assert "transformers.configuration_utils" in str(place_in_library(caught.value))
    with pytest.raises(AttributeError) as caught_here:
        quantization_settings(7)  # type: ignore[arg-type]
    assert place_in_library(caught_here.value) is None
