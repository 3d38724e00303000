"""The CPU benchmark model: Qwen3-MoE's shape scaled down, random weights, random tokens."""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS, VOCAB = 512, 256, 64, 8, 4, 4096


def build(dtype: torch.dtype, seed: int = 0, layers: int = LAYERS) -> Qwen3MoeForCausalLM:
    """The model on the CPU, in evaluation mode; weights of standard deviation 0.05."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        norm_topk_prob=True,
        initializer_range=0.05,
        attn_implementation="sdpa",
    )
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


def tokens(sequences: int, length: int, batch: int, seed: int = 1) -> list[torch.Tensor]:
    """`sequences` x `length` random token ids, in batches of `batch`."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (sequences, length), generator=rng)
    return list(ids.split(batch))
