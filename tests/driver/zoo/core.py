"""Tiny configurations of the architectures people prune most."""

from tests.driver.zoo.build import Spec

_GROUPED = {"n_group": 2, "topk_group": 1}
_DENSE_FIRST = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
_DENSE_TYPES = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_MLA = {"num_key_value_heads": 4}  # multi-head latent attention has one key-value head a head
_MAMBA = {
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 8,
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "moe_shared_expert_intermediate_size": 20,
    "routed_scaling_factor": 1.75,
    **_GROUPED,
}
_GEMMA = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 24,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_KIMI_LINEAR = {
    **_DENSE_TYPES,
    **_GROUPED,
    **_MLA,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
_KIMI_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}

CORE: dict[str, Spec] = {
    "qwen3_moe": Spec("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "qwen2_moe": Spec("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {"norm_topk_prob": False}),
    "mixtral": Spec("MixtralConfig", "MixtralForCausalLM", {"num_experts_per_tok": 2}),
    "olmoe": Spec("OlmoeConfig", "OlmoeForCausalLM", {"intermediate_size": 24}),
    "deepseek_v2": Spec(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**_DENSE_FIRST, **_GROUPED, **_MLA, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": Spec(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", {**_DENSE_FIRST, **_GROUPED, **_MLA}
    ),
    "deepseek_v32": Spec(
        "DeepseekV32Config", "DeepseekV32ForCausalLM", {**_DENSE_TYPES, **_GROUPED, **_MLA}
    ),
    "glm4_moe": Spec("Glm4MoeConfig", "Glm4MoeForCausalLM", {**_DENSE_FIRST, **_GROUPED}),
    "glm4_moe_lite": Spec("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {**_DENSE_TYPES, **_MLA}),
    "glm_moe_dsa": Spec("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", {**_DENSE_TYPES, **_MLA}),
    "gpt_oss": Spec("GptOssConfig", "GptOssForCausalLM", {"intermediate_size": 24}),
    "minimax_m2": Spec("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {"intermediate_size": 24}),
    "kimi_linear": Spec("KimiLinearConfig", "KimiLinearForCausalLM", _KIMI_LINEAR),
    "qwen3_next": Spec("Qwen3NextConfig", "Qwen3NextForCausalLM", _LINEAR),
    "qwen3_5_moe": Spec("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _LINEAR),
    "gemma4": Spec("Gemma4TextConfig", "Gemma4ForCausalLM", _GEMMA),
    "ernie4_5_moe": Spec(
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {"num_hidden_layers": 3, "moe_k": 3},
    ),
    "hunyuan_v1_moe": Spec(
        "HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {"moe_topk": 3, "intermediate_size": 24}
    ),
    "granitemoe": Spec("GraniteMoeConfig", "GraniteMoeForCausalLM", {"intermediate_size": 24}),
    "phimoe": Spec(
        "PhimoeConfig", "PhimoeForCausalLM", {"num_experts_per_tok": 2, "intermediate_size": 24}
    ),
    "nemotron_h": Spec("NemotronHConfig", "NemotronHForCausalLM", _MAMBA),
    "nemotron_h_latent": Spec(
        "NemotronHConfig", "NemotronHForCausalLM", {**_MAMBA, "moe_latent_size": 16}
    ),
    "mimo_v2_flash": Spec(
        "MiMoV2FlashConfig",
        "MiMoV2FlashForCausalLM",
        {**_DENSE_TYPES, **_GROUPED, "layer_types": ["full_attention", *["sliding_attention"] * 2]},
    ),
    "afmoe": Spec("AfmoeConfig", "AfmoeForCausalLM", {"num_hidden_layers": 3, "route_scale": 1.5}),
    "dots1": Spec("Dots1Config", "Dots1ForCausalLM", {**_DENSE_FIRST, **_GROUPED}),
    "lfm2_moe": Spec(
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "jamba": Spec(
        "JambaConfig",
        "JambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "intermediate_size": 24,
        },
    ),
    "flex_olmo": Spec("FlexOlmoConfig", "FlexOlmoForCausalLM", {"intermediate_size": 24}),
    "exaone_moe": Spec("ExaoneMoeConfig", "ExaoneMoeForCausalLM", {**_DENSE_FIRST, **_GROUPED}),
    "solar_open": Spec("SolarOpenConfig", "SolarOpenForCausalLM", _GROUPED),
    "kimi_k25": Spec(
        "Kimi_K25Config",
        "Kimi_K25ForConditionalGeneration",
        {"projection_hidden_size": 16},
        {
            "text_config": ("DeepseekV3Config", {**_DENSE_FIRST, **_GROUPED, **_MLA}),
            "vision_config": ("Kimi_K25VisionConfig", _KIMI_VISION),
        },
    ),
}
