"""Small models whose routers the demo's model does not have, with random weights in float32."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.driver.published.checkpoint import write_tokenizer
from tests.driver.published.reduce import VOCAB

# Heads have 32 values, the fewest that vLLM's attention on a CPU takes.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS, GROUPS, TOP_K = 32, 4, 4
# Name -> its classes in transformers, without their endings, and fields of its configuration.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Sigmoid scores, a bias for selection, two of four groups, scaled gates, a layer without
    # experts before those that have them, and a shared expert.
    "grouped": (
        "Glm4Moe",
        {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "num_experts_per_tok": TOP_K,
            "n_group": GROUPS,
            "topk_group": 2,
            "routed_scaling_factor": 1.75,
        },
    ),
    # vLLM has no class of its own for it.
    "external": (
        "FlexOlmo",
        {
            "num_hidden_layers": 2,
            "intermediate_size": 32,
            "num_experts": 7,
            "num_experts_per_tok": 3,
        },
    ),
}


def write_model(name: str, folder: Path) -> Path:
    """Writes a checkpoint with its tokenizer into a new folder; returns it."""
    kind, fields = _MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**_COMMON, **fields)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():  # matrices of unit gain, vectors near their start
            noise = torch.randn(tensor.shape, generator=generator)
            wide = tensor.ndim > 1
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]) if wide else tensor + 0.02 * noise)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
