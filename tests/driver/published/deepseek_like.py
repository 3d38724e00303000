"""The published models with DeepSeek's layout: GLM, DeepSeek and Kimi."""

from tests.driver.published.entry import Published, nextn
from tests.driver.published.shapes import (
    ATTENTION,
    BIASED,
    CONFIG_COPY,
    INDEXER,
    LATENT_ATTENTION,
    NARROW_EXPERTS,
    NO_NEXTN,
    PER_EXPERT,
)

DEEPSEEK_LIKE: dict[str, Published] = {
    "glm-4.5-air": Published(
        hub_id="zai-org/GLM-4.5-Air",
        source=(
            "Widths, depths and expert counts from stored engine tests and launch scripts; "
            "flags and token ids partly from the config class's defaults. MTP layer with "
            "its own embedding and head: not verified."
        ),
        counts=("n_routed_experts",),
        kept=64,
        overrides={**ATTENTION, **NARROW_EXPERTS, "num_hidden_layers": 3},
        moe_layers=(1, 2),
        routers=BIASED,
        mtp=nextn(2, own_embedding=True),
        cleared=NO_NEXTN,
        names=(
            *PER_EXPERT,
            "model.layers.3.eh_proj.weight",
            "model.layers.3.mlp.experts.127.up_proj.weight",
        ),
    ),
    "glm-4.7": Published(
        hub_id="zai-org/GLM-4.7",
        source=(
            "Widths, depths, expert counts, scaling from a stored config copy; flags and "
            "token ids taken over from GLM-4.5, not verified."
        ),
        counts=("n_routed_experts",),
        kept=80,
        overrides={**ATTENTION, **NARROW_EXPERTS, "num_hidden_layers": 5},
        moe_layers=(3, 4),
        routers=BIASED,
        mtp=nextn(4, own_embedding=True),
        cleared=NO_NEXTN,
        names=(
            "model.layers.2.mlp.gate_proj.weight",
            "model.layers.3.mlp.experts.159.gate_proj.weight",
            "model.layers.4.mlp.gate.e_score_correction_bias",
            "model.layers.5.shared_head.head.weight",
        ),
    ),
    "glm-4.7-flash": Published(
        hub_id="zai-org/GLM-4.7-Flash",
        source=(
            "Widths, depths, expert counts, MLA ranks, scaling from stored config copies; "
            "rope and token id fields not verified."
        ),
        counts=("n_routed_experts",),
        kept=32,
        overrides={**LATENT_ATTENTION, **NARROW_EXPERTS, "num_hidden_layers": 3},
        moe_layers=(1, 2),
        routers=BIASED,
        mtp=nextn(2, own_embedding=True),
        cleared=NO_NEXTN,
        names=(*PER_EXPERT, "model.layers.3.enorm.weight"),
    ),
    "glm-5": Published(
        hub_id="zai-org/GLM-5",
        source=CONFIG_COPY + " MTP extras as in the FP8 config's list of unconverted modules.",
        counts=("n_routed_experts",),
        kept=128,
        overrides={
            **LATENT_ATTENTION,
            **INDEXER,
            **NARROW_EXPERTS,
            "head_dim": 8,
            "qk_head_dim": 24,
            "num_hidden_layers": 5,
        },
        moe_layers=(3, 4),
        routers=BIASED,
        mtp=nextn(4),
        cleared=NO_NEXTN,
        names=(
            "model.layers.3.mlp.experts.255.down_proj.weight",
            "model.layers.0.self_attn.indexer.weights_proj.weight",
            "model.layers.5.hnorm.weight",
            "model.layers.5.mlp.gate.e_score_correction_bias",
        ),
        float32=r"e_score_correction_bias$|weights_proj\.weight$",
    ),
    "deepseek-r1": Published(
        hub_id="deepseek-ai/DeepSeek-R1",
        source=CONFIG_COPY
        + " MTP layer with its own embedding and head: as DeepSeek-V3 publishes.",
        not_plain="a partial FP8 scale block is refused by transformers' dequantization",
        counts=("n_routed_experts",),
        kept=128,
        overrides={**LATENT_ATTENTION, **NARROW_EXPERTS, "num_hidden_layers": 5},
        moe_layers=(3, 4),
        routers=BIASED,
        mtp=nextn(4, own_embedding=True),
        cleared=NO_NEXTN,
        names=(
            "model.layers.3.mlp.experts.255.gate_proj.weight_scale_inv",
            "model.layers.5.mlp.experts.0.down_proj.weight_scale_inv",
            "model.layers.5.embed_tokens.weight",
        ),
        quantized="fp8",
    ),
    "deepseek-v3.2": Published(
        hub_id="deepseek-ai/DeepSeek-V3.2",
        source=CONFIG_COPY
        + " MTP layer with its own embedding and head: as DeepSeek-V3 publishes.",
        not_plain="a partial FP8 scale block is refused by transformers' dequantization",
        counts=("n_routed_experts",),
        kept=128,
        # kv_a_proj_with_mqa: 272 rows, a partial third scale block; published 576, partial fifth.
        overrides={
            **LATENT_ATTENTION,
            **INDEXER,
            **NARROW_EXPERTS,
            "kv_lora_rank": 256,
            "qk_rope_head_dim": 16,
            "num_hidden_layers": 5,
        },
        moe_layers=(3, 4),
        routers=BIASED,
        mtp=nextn(4, own_embedding=True),
        cleared=NO_NEXTN,
        names=(
            "model.layers.3.mlp.experts.255.gate_proj.weight_scale_inv",
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv",
            "model.layers.5.mlp.experts.0.down_proj.weight_scale_inv",
            "model.layers.5.embed_tokens.weight",
        ),
        quantized="fp8",
    ),
    "kimi-k2": Published(
        hub_id="moonshotai/Kimi-K2-Instruct",
        source=CONFIG_COPY,
        not_plain="DeepseekV3ForCausalLM looks key conversions up under kimi_k2, which has none",
        counts=("n_routed_experts",),
        kept=192,
        overrides={**LATENT_ATTENTION, **NARROW_EXPERTS, "num_hidden_layers": 3},
        moe_layers=(1, 2),
        routers=BIASED,
        names=("model.layers.1.mlp.experts.383.gate_proj.weight_scale_inv",),
        quantized="fp8",
    ),
    "kimi-linear-48b-a3b": Published(
        hub_id="moonshotai/Kimi-Linear-48B-A3B-Instruct",
        source=(
            "Every width, count and layer list from stored config copies; pad id and "
            "transformers version not verified."
        ),
        counts=("num_experts",),
        top_k="num_experts_per_token",
        kept=128,
        overrides={
            **LATENT_ATTENTION,
            **NARROW_EXPERTS,
            "q_lora_rank": None,
            "linear_attn_config.full_attn_layers": [3],
            "linear_attn_config.kda_layers": [1, 2],
            "linear_attn_config.head_dim": 16,
            "linear_attn_config.num_heads": 4,
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
        block="model.layers.{i}.block_sparse_moe.",
        routers=BIASED,
        names=(
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.1.block_sparse_moe.experts.255.w1.weight",
            "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
            "model.layers.1.self_attn.q_conv1d.weight",
        ),
        renames={r"^(model\.layers\.0\.)block_sparse_moe\.": r"\1mlp."},
        float32=r"e_score_correction_bias$|A_log$|dt_bias$",
    ),
}
