"""Widths of the small models, and what several of them share."""

GROUPED_HEADS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HEADS = {**GROUPED_HEADS, "num_key_value_heads": 4}
ATTENTION = {**GROUPED_HEADS, "head_dim": 16}
LATENT_ATTENTION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
INDEXER = {"index_head_dim": 16, "index_n_heads": 2}
NARROW_EXPERTS = {"moe_intermediate_size": 32}
NO_NEXTN = {"num_nextn_predict_layers": 0}

CONFIG_COPY = "Every field as in a stored copy of the published config.json."
BIASED = {"gate.weight": 0, "gate.e_score_correction_bias": 0}
PER_EXPERT = ("model.layers.1.mlp.experts.7.gate_proj.weight", "model.layers.1.mlp.gate.weight")
