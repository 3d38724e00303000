"""Small configurations written by hand, for architectures without a copy of a published one.

Names of fields are those that engines and transformers read. Numbers of experts, chosen and shared
ones too, are the named model's: of dots1 and granitemoe by their published `config.json`, of
flex_olmo by the defaults of its class in transformers; other values are small, or not verified. A
configuration that names no model has numbers of its own.
"""

from typing import Any

from tests.driver.published.entry import Published

_BY_HAND = "Written by hand from the fields that transformers and engines read; not a copy."
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
# A router as DeepSeek-V3's.
_SIGMOID: dict[str, Any] = {
    **_COMMON,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_GRANITE: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 32,
    "num_experts_per_tok": 8,
    "attention_multiplier": 0.03125,
    "embedding_multiplier": 12.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.22,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": True,
}


# No model, where its numbers of experts could not be found.
_NO_MODEL = ""


def _entry(hub_id: str, count: str, kept: int, top_k: str = "num_experts_per_tok") -> Published:
    return Published(hub_id, _BY_HAND, (count,), kept, overrides={}, names=(), top_k=top_k)


WRITTEN: dict[str, tuple[Published, dict[str, Any]]] = {
    "dots1": (
        _entry("rednote-hilab/dots.llm1.inst", "n_routed_experts", 96),
        {
            **_SIGMOID,
            "architectures": ["Dots1ForCausalLM"],
            "model_type": "dots1",
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "sliding_window": None,
            "max_window_layers": 2,
            "rope_scaling": None,
        },
    ),
    "exaone_moe": (
        _entry("LGAI-EXAONE/K-EXAONE-236B-A23B", "num_experts", 96),
        {
            **_SIGMOID,
            "architectures": ["ExaoneMoEForCausalLM"],
            "model_type": "exaone_moe",
            "num_hidden_layers": 3,
            "head_dim": 32,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "is_moe_layer": [False, True, True],
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 128,
            "sliding_window_pattern": "LLLG",
            "num_experts": 128,
            "num_shared_experts": 1,
            "num_experts_per_tok": 8,
            "num_nextn_predict_layers": 0,
        },
    ),
    "granitemoe": (
        _entry("ibm-granite/granite-3.1-3b-a800m-instruct", "num_local_experts", 30),
        {
            **_GRANITE,
            "architectures": ["GraniteMoeForCausalLM"],
            "model_type": "granitemoe",
            "num_local_experts": 40,
        },
    ),
    "granitemoeshared": (
        _entry(_NO_MODEL, "num_local_experts", 48),
        {
            **_GRANITE,
            "architectures": ["GraniteMoeSharedForCausalLM"],
            "model_type": "granitemoeshared",
            "num_local_experts": 64,
            "shared_intermediate_size": 64,
        },
    ),
    "hunyuan_v1_moe": (
        _entry("tencent/Hunyuan-A13B-Instruct", "num_experts", 48, top_k="moe_topk"),
        {
            **_COMMON,
            "architectures": ["HunYuanMoEV1ForCausalLM"],
            "model_type": "hunyuan_v1_moe",
            # The converter of llama.cpp takes these values alone.
            "hidden_size": 256,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
            "intermediate_size": 32,
            "moe_intermediate_size": [32, 32],
            "num_experts": 64,
            "moe_topk": [8, 8],
            "num_shared_expert": [1, 1],
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": False,
        },
    ),
    "flex_olmo": (
        _entry("allenai/FlexOlmo-7x7B-1T", "num_experts", 6),
        {
            **_COMMON,
            "architectures": ["FlexOlmoForCausalLM"],
            "model_type": "flex_olmo",
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_experts": 7,
            "num_experts_per_tok": 5,
            "norm_topk_prob": False,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
            "rope_scaling": None,
        },
    ),
}
