"""Files for the stage `streaming`: DeepSeek-V3's layers with random weights, as they are published.

Written shard by shard, each tensor drawn on the device, so that memory holds one shard.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FORMATS = ("fp8", "bf16")
BLOCK = 128
_SHARD_BYTES = 2 << 30
_FP8, _BF16, _FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
_FP8_MAX = 448.0
# Random FP8 values are spread this wide, so that few meet the largest one.
_FP8_SPREAD = 100.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a model whose decoder layers are all MoE layers, named as its config names them."""

    name: str
    num_hidden_layers: int
    hidden_size: int
    n_routed_experts: int
    moe_intermediate_size: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    vocab_size: int

    def config(self, format: str) -> dict[str, object]:
        """Its config.json."""
        sizes = {key: value for key, value in vars(self).items() if key != "name"}
        config: dict[str, object] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": self.num_attention_heads,
            "intermediate_size": self.moe_intermediate_size,  # of dense layers: there are none
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            **sizes,
        }
        if format == "fp8":
            blocks = {"weight_block_size": [BLOCK, BLOCK], "quant_method": "fp8"}
            config["quantization_config"] = {
                **blocks,
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
            }
        return config


# Published sizes but for the vocabulary, which lies outside the layers, and the number of layers.
TRUE = Shape(
    name="DeepSeek-V3's layers",
    num_hidden_layers=3,
    hidden_size=7168,
    n_routed_experts=256,
    moe_intermediate_size=2048,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    vocab_size=4096,
)
TINY = Shape(
    name="tiny",
    num_hidden_layers=2,
    hidden_size=64,
    n_routed_experts=8,
    moe_intermediate_size=32,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    vocab_size=256,
)


def tensors(shape: Shape, format: str) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Key, size and dtype of every tensor of the files, in their order."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    yield "model.embed_tokens.weight", (vocab, hidden), _BF16
    for number in range(shape.num_hidden_layers):
        for key, size in _layer(shape):
            name = f"model.layers.{number}.{key}"
            quantized = format == "fp8" and len(size) == 2 and key != "mlp.gate.weight"
            own = _FP8 if quantized else _FP32 if key.endswith("correction_bias") else _BF16
            yield name, size, own
            if quantized:
                yield f"{name}_scale_inv", tuple(math.ceil(n / BLOCK) for n in size), _FP32
    yield "model.norm.weight", (hidden,), _BF16
    yield "lm_head.weight", (vocab, hidden), _BF16


def _layer(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of every tensor of one decoder layer."""
    hidden, heads, rope = shape.hidden_size, shape.num_attention_heads, shape.qk_rope_head_dim
    q, kv, nope, value = (
        shape.q_lora_rank,
        shape.kv_lora_rank,
        shape.qk_nope_head_dim,
        shape.v_head_dim,
    )
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "self_attn.q_a_proj.weight", (q, hidden)
    yield "self_attn.q_a_layernorm.weight", (q,)
    yield "self_attn.q_b_proj.weight", (heads * (nope + rope), q)
    yield "self_attn.kv_a_proj_with_mqa.weight", (kv + rope, hidden)
    yield "self_attn.kv_a_layernorm.weight", (kv,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), kv)
    yield "self_attn.o_proj.weight", (hidden, heads * value)
    yield "mlp.gate.weight", (shape.n_routed_experts, hidden)
    yield "mlp.gate.e_score_correction_bias", (shape.n_routed_experts,)
    experts = [f"mlp.experts.{expert}" for expert in range(shape.n_routed_experts)]
    for expert in ("mlp.shared_experts", *experts):
        yield f"{expert}.gate_proj.weight", (shape.moe_intermediate_size, hidden)
        yield f"{expert}.up_proj.weight", (shape.moe_intermediate_size, hidden)
        yield f"{expert}.down_proj.weight", (hidden, shape.moe_intermediate_size)


def nbytes(shape: Shape, format: str) -> int:
    """What the files of a shape take, but for their headers."""
    return sum(math.prod(size) * dtype.itemsize for _, size, dtype in tensors(shape, format))


def write(
    shape: Shape,
    format: str,
    folder: Path,
    device: torch.device,
    wrote: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a checkpoint into a new folder; `wrote` is told the bytes after each shard."""
    from safetensors.torch import save_file  # comes with transformers

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(format)))
    rng = torch.Generator(device).manual_seed(0)
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    held = done = number = 0

    def flush() -> None:
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        forget(folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        wrote(done)

    for key, size, dtype in tensors(shape, format):
        shard[key] = _random(key, size, dtype, rng).cpu()
        held, done = held + shard[key].nbytes, done + shard[key].nbytes
        if held >= _SHARD_BYTES:
            flush()
            held, number = 0, number + 1
    if shard:
        flush()
    index = {"metadata": {"total_size": done}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(key: str, size: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Matrices of unit gain, vectors near where training starts."""
    noise = torch.randn(size, generator=rng, device=rng.device)
    if dtype == _FP8:
        return (noise * _FP8_SPREAD).clamp(-_FP8_MAX, _FP8_MAX).to(dtype)
    if key.endswith("_scale_inv"):
        spread = 0.5 + torch.rand(size, generator=rng, device=rng.device)
        return spread / (_FP8_SPREAD * math.sqrt(size[-1] * BLOCK))
    if len(size) == 2:
        gain = 1.0 if "embed" in key else 1 / math.sqrt(size[-1])
        return (noise * gain).to(dtype)
    return (noise * 0.02 + (1.0 if key.endswith("norm.weight") else 0.0)).to(dtype)


def forget(path: Path) -> None:
    """Asks the system to drop a file from memory, where it can: reads are to come from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages that are not on the disk yet stay
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
