"""The published models: source of each configuration, how it is shrunk, tensor names on disk.

`configs/<name>.json` holds the fields of the published `config.json`. This table holds the rest,
one entry a model: the overrides that make it small (expert counts, top-k and groups stay), and the
tensor names its publisher uses.
"""

from tests.driver.published.deepseek_like import DEEPSEEK_LIKE
from tests.driver.published.entry import Mtp, Published
from tests.driver.published.shapes import (
    ATTENTION,
    CONFIG_COPY,
    GROUPED_HEADS,
    HEADS,
    NARROW_EXPERTS,
    NO_NEXTN,
    PER_EXPERT,
)

MODELS: dict[str, Published] = {
    "qwen1.5-moe-a2.7b": Published(
        hub_id="Qwen/Qwen1.5-MoE-A2.7B-Chat",
        source=(
            "Fields up to num_key_value_heads as in a stored copy of its GPTQ release's config; "
            "epsilon, theta and sliding window from stored engine tests; the rest not verified."
        ),
        counts=("num_experts",),
        kept=45,
        ratio=0.25,
        overrides={
            **HEADS,
            **NARROW_EXPERTS,
            "shared_expert_intermediate_size": 96,
            "num_hidden_layers": 2,
        },
        names=(*PER_EXPERT, "model.layers.1.mlp.shared_expert_gate.weight"),
    ),
    "qwen3-30b-a3b": Published(
        hub_id="Qwen/Qwen3-30B-A3B",
        source=CONFIG_COPY,
        counts=("num_experts",),
        kept=96,
        ratio=0.25,
        overrides={**ATTENTION, **NARROW_EXPERTS, "num_hidden_layers": 2},
        names=PER_EXPERT,
    ),
    "qwen3-coder-480b-a35b": Published(
        hub_id="Qwen/Qwen3-Coder-480B-A35B-Instruct",
        source=CONFIG_COPY,
        counts=("num_experts",),
        kept=80,
        overrides={**ATTENTION, **NARROW_EXPERTS, "num_hidden_layers": 2},
        names=PER_EXPERT,
    ),
    "qwen3.5-397b-a17b": Published(
        hub_id="Qwen/Qwen3.5-397B-A17B",
        source=(
            CONFIG_COPY
            + " Fused expert and mtp.* names as in stored copies of published tensor lists."
        ),
        counts=("text_config.num_experts",),
        top_k="text_config.num_experts_per_tok",
        kept=256,
        overrides={
            "text_config.hidden_size": 64,
            "text_config.num_attention_heads": 4,
            "text_config.num_key_value_heads": 2,
            "text_config.head_dim": 32,
            "text_config.layer_types": ["linear_attention", "full_attention"],
            "text_config.num_hidden_layers": 2,
            "text_config.linear_key_head_dim": 16,
            "text_config.linear_value_head_dim": 16,
            "text_config.linear_num_key_heads": 2,
            "text_config.linear_num_value_heads": 4,
            "text_config.moe_intermediate_size": 32,
            "text_config.shared_expert_intermediate_size": 32,
            "text_config.rope_parameters.mrope_section": [2, 1, 1],
            "vision_config.depth": 1,
            "vision_config.hidden_size": 32,
            "vision_config.intermediate_size": 48,
            "vision_config.num_heads": 2,
            "vision_config.num_position_embeddings": 16,
            "vision_config.out_hidden_size": 64,
            "vision_config.patch_size": 4,
        },
        block="model.language_model.layers.{i}.mlp.",
        stacked=("experts.gate_up_proj", "experts.down_proj"),
        names=(
            "model.language_model.layers.0.mlp.experts.gate_up_proj",
            "model.language_model.layers.0.linear_attn.in_proj_qkv.weight",
            "model.visual.patch_embed.proj.weight",
            "mtp.layers.0.mlp.experts.gate_up_proj",
            "lm_head.weight",
        ),
        revert=False,
        mtp=Mtp(
            block="mtp.layers.{i}.",
            like="model.language_model.layers.1.",
            extras={
                "mtp.fc.weight": ("H", "2H"),
                "mtp.norm.weight": ("H",),
                "mtp.pre_fc_norm_embedding.weight": ("H",),
                "mtp.pre_fc_norm_hidden.weight": ("H",),
            },
        ),
        cleared={"text_config.mtp_num_hidden_layers": 0},
        float32=r"A_log$|linear_attn\.norm\.weight$",
    ),
    **DEEPSEEK_LIKE,
    "minimax-m2": Published(
        hub_id="MiniMaxAI/MiniMax-M2.5",
        source=(
            CONFIG_COPY
            + " The checkpoint brings no MTP tensors though the config counts three: not "
            "verified."
        ),
        counts=("num_local_experts",),
        kept=128,
        # Wide enough for two scale blocks in a row.
        overrides={
            **ATTENTION,
            "hidden_size": 256,
            "intermediate_size": 32,
            "rotary_dim": 8,
            "num_hidden_layers": 2,
        },
        block="model.layers.{i}.block_sparse_moe.",
        routers={"gate.weight": 0, "e_score_correction_bias": 0},
        cleared={"use_mtp": False, "num_mtp_modules": 0},
        names=(
            "model.layers.1.block_sparse_moe.experts.255.w2.weight_scale_inv",
            "model.layers.1.block_sparse_moe.e_score_correction_bias",
        ),
        quantized="fp8",
    ),
    "step-3.5-flash": Published(
        hub_id="stepfun-ai/Step-3.5-Flash",
        source=(
            "Field names and most values from stored engine tests of Step-3.5 and Step-3.7;"
            " token ids not verified."
        ),
        counts=("moe_num_experts",),
        top_k="moe_top_k",
        kept=173,
        ratio=0.4,
        overrides={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_attention_groups": 2,
            "head_dim": 16,
            "attention_other_setting.num_attention_heads": 6,
            "attention_other_setting.num_attention_groups": 2,
            "attention_other_setting.head_dim": 16,
            "num_hidden_layers": 5,
            "layer_types": ["full_attention", *["sliding_attention"] * 3] * 2,
            "rope_theta": [5000000.0, 10000.0, 10000.0, 10000.0] * 2,
            "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0] * 2,
            "swiglu_limits": [0.0, 0.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0],
            "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.0, 16.0, 0.0, 0.0, 0.0],
            "moe_layers_enum": "3,4",
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
        },
        moe_layers=(3, 4),
        block="model.layers.{i}.moe.",
        stacked=("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        routers={"gate.weight": 0, "router_bias": 0},
        names=(
            "model.layers.3.moe.gate_proj.weight",
            "model.layers.3.moe.router_bias",
            "model.layers.4.share_expert.up_proj.weight",
            "model.layers.2.mlp.up_proj.weight",
            "model.layers.7.transformer.shared_head.output.weight",
        ),
        revert=False,
        renames={
            r"\.mlp\.gate\.weight$": ".moe.gate.weight",
            r"\.mlp\.gate\.e_score_correction_bias$": ".moe.router_bias",
            r"\.mlp\.experts\.down_proj$": ".moe.down_proj.weight",
            r"\.mlp\.shared_experts\.": ".share_expert.",
        },
        splits={r"\.mlp\.experts\.gate_up_proj$": (".moe.gate_proj.weight", ".moe.up_proj.weight")},
        mtp=Mtp(
            block="model.layers.{n}.",
            like="model.layers.1.",
            extras={
                "model.layers.{n}.eh_proj.weight": ("H", "2H"),
                "model.layers.{n}.enorm.weight": ("H",),
                "model.layers.{n}.hnorm.weight": ("H",),
                "model.layers.{n}.transformer.shared_head.norm.weight": ("H",),
                "model.layers.{n}.transformer.shared_head.output.weight": ("V", "H"),
            },
            count=3,
        ),
        cleared=NO_NEXTN,
        per_layer=(
            "layer_types",
            "rope_theta",
            "partial_rotary_factors",
            "swiglu_limits",
            "swiglu_limits_shared",
        ),
        float32=r"router_bias$",
    ),
    "gpt-oss-120b": Published(
        hub_id="openai/gpt-oss-120b",
        source=CONFIG_COPY,
        counts=("num_local_experts",),
        kept=64,
        overrides={
            **ATTENTION,
            "intermediate_size": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
        },
        stacked=tuple(
            f"experts.{weight}_{part}"
            for weight in ("gate_up_proj", "down_proj")
            for part in ("blocks", "scales", "bias")
        ),
        routers={"router.weight": 0, "router.bias": 0},
        names=(
            "model.layers.1.mlp.experts.gate_up_proj_blocks",
            "model.layers.1.mlp.experts.down_proj_scales",
            "model.layers.1.mlp.experts.down_proj_bias",
            "model.layers.0.self_attn.sinks",
        ),
        quantized="mxfp4",
    ),
    "gemma-4-26b-a4b": Published(
        hub_id="google/gemma-4-26B-A4B",
        source=CONFIG_COPY + " Without the vision config's keys that every configuration has.",
        counts=("text_config.num_experts",),
        top_k="text_config.top_k_experts",
        kept=64,
        overrides={
            **{f"text_config.{name}": value for name, value in ATTENTION.items()},
            "text_config.moe_intermediate_size": 32,
            "text_config.global_head_dim": 32,
            "text_config.num_global_key_value_heads": 1,
            "text_config.layer_types": ["sliding_attention", "full_attention"],
            "text_config.num_hidden_layers": 2,
            "vision_config.hidden_size": 32,
            "vision_config.intermediate_size": 48,
            "vision_config.num_attention_heads": 2,
            "vision_config.num_key_value_heads": 2,
            "vision_config.head_dim": 16,
            "vision_config.global_head_dim": 16,
            "vision_config.num_hidden_layers": 1,
            "vision_config.position_embedding_size": 64,
        },
        block="model.language_model.layers.{i}.",
        stacked=("experts.gate_up_proj", "experts.down_proj"),
        routers={"router.proj.weight": 0, "router.per_expert_scale": 0},
        names=(
            "model.language_model.layers.0.experts.gate_up_proj",
            "model.language_model.layers.0.router.per_expert_scale",
            "model.language_model.layers.0.router.scale",
        ),
    ),
    "llama-4-scout-17b-16e": Published(
        hub_id="meta-llama/Llama-4-Scout-17B-16E-Instruct",
        source=(
            "Text fields as in a stored config copy; vision fields and token ids from the "
            "config class's defaults."
        ),
        counts=("text_config.num_local_experts",),
        top_k="text_config.num_experts_per_tok",
        kept=8,
        overrides={
            **{f"text_config.{name}": value for name, value in ATTENTION.items()},
            "text_config.intermediate_size_mlp": 96,
            "text_config.num_hidden_layers": 2,
            "vision_config.hidden_size": 32,
            "vision_config.intermediate_size": 128,
            "vision_config.image_size": 28,
            "vision_config.num_attention_heads": 2,
            "vision_config.num_hidden_layers": 1,
            "vision_config.projector_input_dim": 32,
            "vision_config.projector_output_dim": 32,
            "vision_config.vision_output_dim": 32,
        },
        block="language_model.model.layers.{i}.feed_forward.",
        stacked=("experts.gate_up_proj", "experts.down_proj"),
        routers={"router.weight": 0},
        names=(
            "language_model.model.layers.0.feed_forward.experts.gate_up_proj",
            "language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight",
            "language_model.lm_head.weight",
            "multi_modal_projector.linear_1.weight",
        ),
    ),
    "mixtral-8x7b": Published(
        hub_id="mistralai/Mixtral-8x7B-v0.1",
        source=CONFIG_COPY,
        counts=("num_local_experts",),
        kept=4,
        overrides={**GROUPED_HEADS, "num_hidden_layers": 2},
        block="model.layers.{i}.block_sparse_moe.",
        names=("model.layers.1.block_sparse_moe.experts.7.w3.weight",),
    ),
    "ernie-4.5-21b-a3b": Published(
        hub_id="baidu/ERNIE-4.5-21B-A3B-PT",
        source=(
            "Widths, depths, expert counts, layer range from stored engine tests; "
            "moe_capacity, number of MTP layers and token ids not verified. mtp_* names "
            "from stored loaders."
        ),
        counts=("moe_num_experts",),
        top_k="moe_k",
        kept=32,
        overrides={
            **ATTENTION,
            **NARROW_EXPERTS,
            "moe_layer_end_index": 2,
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
        routers={"gate.weight": 0, "moe_statics.e_score_correction_bias": 1},
        names=(
            *PER_EXPERT,
            "model.layers.1.mlp.moe_statics.e_score_correction_bias",
            "model.mtp_linear_proj.0.weight",
        ),
        mtp=Mtp(
            block="model.mtp_block.{i}.",
            like="model.layers.0.",
            extras={
                "model.mtp_emb_norm.{i}.weight": ("H",),
                "model.mtp_hidden_norm.{i}.weight": ("H",),
                "model.mtp_linear_proj.{i}.weight": ("H", "2H"),
            },
        ),
        cleared=NO_NEXTN,
        float32=r"e_score_correction_bias$|mlp\.gate\.weight$",
    ),
    "olmoe-1b-7b": Published(
        hub_id="allenai/OLMoE-1B-7B-0924",
        source=(
            "Widths, counts and flags from stored config copies; token ids and context "
            "length from the config class's defaults."
        ),
        counts=("num_experts",),
        kept=32,
        overrides={**HEADS, "intermediate_size": 32, "num_hidden_layers": 2},
        names=PER_EXPERT,
    ),
}
