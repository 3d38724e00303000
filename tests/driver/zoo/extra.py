"""Tiny configurations of the other architectures transformers loads natively."""

from tests.driver.zoo.build import Spec
from tests.driver.zoo.core import _DENSE_FIRST, _DENSE_TYPES, _GROUPED, _LINEAR, _MLA

_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": (0,),
}
_OMNI = "qwen3_omni_moe.configuration_qwen3_omni_moe.Qwen3OmniMoe"
_AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "downsample_hidden_size": 8,
}
_OCR = "deepseek_ocr2.configuration_deepseek_ocr2.DeepseekOcr2"
_VISION_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}
_SAM = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "output_channels": 8,
    "mlp_dim": 16,
    "global_attn_indexes": [0],
    "downsample_channels": [8, 16],
}
_INTERMEDIATE = {"intermediate_size": 24}
_HYPER = {"hc_mult": 2}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
}

_THINKER = Spec(
    "Qwen3OmniMoeThinkerConfig",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    {"vision_start_token_id": 151652},  # in published configs, not in the class
    {
        "text_config": (
            f"{_OMNI}TextConfig",
            {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
        ),
        "vision_config": (f"{_OMNI}VisionEncoderConfig", _VISION),
        "audio_config": (f"{_OMNI}AudioEncoderConfig", _AUDIO),
    },
)
_TALKER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_code_groups": 4,
}

EXTRA: dict[str, Spec] = {
    "qwen3_5_moe_vl": Spec(
        "Qwen3_5MoeConfig",
        "Qwen3_5MoeForConditionalGeneration",
        {},
        {
            "text_config": ("Qwen3_5MoeTextConfig", _LINEAR),
            "vision_config": ("Qwen3_5MoeVisionConfig", _VISION),
        },
    ),
    "qwen3_vl_moe": Spec(
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        {},
        {
            "text_config": ("Qwen3VLMoeTextConfig", {}),
            "vision_config": ("Qwen3VLMoeVisionConfig", _VISION),
        },
    ),
    "glm4v_moe": Spec(
        "Glm4vMoeConfig",
        "Glm4vMoeForConditionalGeneration",
        {},
        {
            "text_config": (
                "Glm4vMoeTextConfig",
                {
                    **_DENSE_FIRST,
                    **_GROUPED,
                    "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]},
                },
            ),
            "vision_config": ("Glm4vMoeVisionConfig", _VISION),
        },
    ),
    "axk1": Spec("AXK1Config", "AXK1ForCausalLM", {**_DENSE_FIRST, **_GROUPED, **_MLA}),
    "axk2": Spec("AXK2Config", "AXK2ForCausalLM", {**_DENSE_TYPES, **_MLA, "gated_norm_rank": 4}),
    "aria_text": Spec("AriaTextConfig", "AriaTextForCausalLM", {**_INTERMEDIATE, "moe_topk": 3}),
    "cohere2_moe": Spec(
        "Cohere2MoeConfig",
        "Cohere2MoeForCausalLM",
        {**_INTERMEDIATE, "num_shared_experts": 1, "logit_scale": 1.0},
    ),
    "deepseek_v4": Spec(
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        {
            **_HYPER,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "layer_types": ["sliding_attention"] * 3,
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "o_groups": 2,
            "o_lora_rank": 8,
            "hc_sinkhorn_iters": 2,
            "swiglu_limit": 0.7,
        },
    ),
    "glm5_next": Spec(
        "Glm5NextConfig",
        "Glm5NextForConditionalGeneration",
        {},
        {
            "text_config": (
                "Glm5NextTextConfig",
                {
                    **_DENSE_TYPES,
                    **_MLA,
                    **_HYPER,
                    "head_dim": 0,
                    "qk_rope_head_dim": 0,
                    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                    "linear_head_dim": 8,
                    "linear_num_heads": 4,
                    "hc_sinkhorn_iters": 2,
                    "index_kpool": 2,
                    "swiglu_limit": 0.7,
                },
            ),
            "vision_config": (
                "Glm5NextVisionConfig",
                {**_VISION, "projection_intermediate_size": 16},
            ),
        },
    ),
    "granitemoe_swa": Spec(
        "GraniteMoeSWAConfig",
        "GraniteMoeSWAForCausalLM",
        {**_INTERMEDIATE, "shared_intermediate_size": 20},
    ),
    "granitemoeshared": Spec(
        "GraniteMoeSharedConfig",
        "GraniteMoeSharedForCausalLM",
        {**_INTERMEDIATE, "shared_intermediate_size": 20},
    ),
    "granitemoehybrid": Spec(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **_INTERMEDIATE,
            "shared_intermediate_size": 20,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_d_head": 16,
            "mamba_chunk_size": 8,
        },
    ),
    "hy_v3": Spec("HYV3Config", "HYV3ForCausalLM", _DENSE_TYPES),
    "hy_v4": Spec(
        "HYV4Config",
        "HYV4ForCausalLM",
        {**_DENSE_TYPES, **_MLA, **_HYPER, "head_dim": 16, "swiglu_limit": 0.7},
    ),
    "inkling": Spec(
        "InklingTextConfig",
        "InklingForCausalLM",
        {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "d_rel": 4,
            "rel_extent": 32,
            "n_shared_experts": 2,
            "route_scale": 1.5,
            "logits_mup_width_multiplier": 2.0,
            "layer_types": ["hybrid_sliding", "hybrid"],
        },
    ),
    "laguna": Spec(
        "LagunaConfig",
        "LagunaForCausalLM",
        {"num_hidden_layers": 3, "moe_routed_scaling_factor": 1.75},
    ),
    "mellum": Spec("MellumConfig", "MellumForCausalLM"),
    "minimax": Spec(
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        {**_INTERMEDIATE, **_LINEAR, "block_size": 8},
    ),
    "minimax_m3_vl": Spec(
        "MiniMaxM3VLTextConfig",
        "MiniMaxM3VLForCausalLM",
        {
            **_INTERMEDIATE,
            **_DENSE_TYPES,
            "dense_intermediate_size": 40,
            "shared_intermediate_size": 20,
            "rotary_dim": 4,
            "swiglu_limit": 0.7,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "mistral4": Spec("Mistral4Config", "Mistral4ForCausalLM", {**_MLA, **_GROUPED}),
    "openai_privacy_filter": Spec(
        "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterForTokenClassification", _INTERMEDIATE
    ),
    "qwen4_exp": Spec(
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        {**_LINEAR, **_INDEXER, "hc_count": 2, "hc_lowrank": 4},
    ),
    "zaya": Spec(
        "ZayaConfig", "ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 12}
    ),
    "ernie4_5_vl_moe": Spec(
        "Ernie4_5_VLMoeConfig",
        "Ernie4_5_VLMoeForConditionalGeneration",
        {},
        {
            "text_config": (
                "Ernie4_5_VLMoeTextConfig",
                {
                    "num_hidden_layers": 3,
                    "moe_k": 3,
                    "rope_parameters": _MROPE,
                    "moe_intermediate_size": [24, 12],
                    "mlp_layer_types": ["dense", "sparse", "sparse"],
                },
            ),
            "vision_config": ("Ernie4_5_VLMoeVisionConfig", _VISION),
        },
    ),
    "qwen3_omni_moe": _THINKER,
    # As published: thinker, talker and vocoder, the experts of the first two counted apart.
    "qwen3_omni_moe_whole": Spec(
        "Qwen3OmniMoeConfig",
        "Qwen3OmniMoeForConditionalGeneration",
        {},
        {
            "thinker_config": _THINKER,
            "talker_config": (
                f"{_OMNI}TalkerConfig",
                {
                    "text_config": {**_TALKER, "num_experts": 8, "num_experts_per_tok": 3},
                    "code_predictor_config": _TALKER,
                    "num_code_groups": 4,
                    "thinker_hidden_size": 32,
                    "accept_hidden_layer": 1,
                    "spatial_merge_size": 2,
                },
            ),
            "code2wav_config": (
                f"{_OMNI}Code2WavConfig",
                {
                    "codebook_size": 64,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_quantizers": 4,
                    "decoder_dim": 16,
                    "upsample_rates": [2, 2],
                    "upsampling_ratios": [2],
                },
            ),
        },
    ),
    "deepseek_ocr2": Spec(
        "DeepseekOcr2Config",
        "DeepseekOcr2ForConditionalGeneration",
        {},
        {
            "text_config": (f"{_OCR}TextConfig", {**_DENSE_TYPES, **_MLA}),
            "vision_config": (
                f"{_OCR}VisionConfig",
                {"sam_config": _SAM, "encoder_config": _VISION_ENCODER},
            ),
        },
    ),
    "step3p7": Spec(
        "Step3p7TextConfig",
        "Step3p5ForCausalLM",
        {
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "share_expert_dim": 20,
            "moe_router_scaling_factor": 1.75,
            "swiglu_limits": [0.0, 0.0, 0.7],
            "swiglu_limits_shared": [0.0, 0.0, 0.7],
        },
    ),
    "longcat_flash": Spec(
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        {
            **_MLA,
            "num_layers": 2,
            "ffn_hidden_size": 40,
            "expert_ffn_hidden_size": 24,
            "moe_topk": 4,
            "zero_expert_num": 4,
            "routed_scaling_factor": 1.75,
        },
    ),
    "llama4": Spec(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_INTERMEDIATE,
            "intermediate_size_mlp": 40,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 64,
        },
    ),
    "dbrx": Spec(
        "DbrxConfig",
        "DbrxForCausalLM",
        {
            "vocab_size": 96,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        },
        {
            "ffn_config": (
                "dbrx.configuration_dbrx.DbrxFFNConfig",
                {
                    "hidden_size": 32,
                    "ffn_hidden_size": 24,
                    "moe_num_experts": 8,
                    "moe_top_k": 3,
                },
            )
        },
    ),
}

# Built for refusal tests only: attention shares its experts' count with the feed-forward layers.
REFUSED: dict[str, Spec] = {
    "jetmoe": Spec(
        "JetMoeConfig", "JetMoeForCausalLM", {"num_experts_per_tok": 2, "kv_channels": 8}
    ),
}
