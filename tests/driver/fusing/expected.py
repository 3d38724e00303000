"""What is bound of each architecture's tiny model, once it has run."""

from typing import NamedTuple


class Bound(NamedTuple):
    """How many are bound by kind, and how many are left to the model; see `Fused.counts`."""

    norm: int
    residual_norm: int
    norm_rotary: int
    rotary: int
    left: int


COUNTS = {
    "qwen3_moe": Bound(3, 2, 4, 1, 0),
    "qwen2_moe": Bound(3, 2, 0, 1, 0),
    "mixtral": Bound(3, 2, 0, 1, 0),
    "olmoe": Bound(7, 2, 0, 1, 0),
    "deepseek_v2": Bound(10, 3, 0, 0, 0),
    "deepseek_v3": Bound(10, 3, 0, 2, 0),
    "deepseek_v32": Bound(10, 3, 0, 2, 0),
    "glm4_moe": Bound(4, 3, 0, 1, 0),
    "glm4_moe_lite": Bound(10, 3, 0, 2, 0),
    "glm_moe_dsa": Bound(10, 3, 0, 1, 0),
    "gpt_oss": Bound(3, 2, 0, 1, 0),
    "minimax_m2": Bound(7, 2, 0, 1, 0),
    "kimi_linear": Bound(6, 3, 0, 0, 2),
    "qwen3_next": Bound(3, 2, 2, 1, 1),
    "qwen3_5_moe": Bound(3, 2, 2, 1, 1),
    "gemma4": Bound(15, 0, 4, 1, 2),
    "ernie4_5_moe": Bound(4, 3, 0, 1, 0),
    "hunyuan_v1_moe": Bound(7, 2, 0, 1, 0),
    "granitemoe": Bound(5, 0, 0, 1, 0),
    "phimoe": Bound(0, 0, 0, 1, 0),
    "nemotron_h": Bound(6, 0, 0, 0, 0),
    "nemotron_h_latent": Bound(6, 0, 0, 0, 0),
    "mimo_v2_flash": Bound(4, 3, 0, 1, 0),
    "afmoe": Bound(13, 0, 6, 1, 3),
    "dots1": Bound(4, 3, 6, 1, 0),
    "lfm2_moe": Bound(4, 3, 2, 1, 0),
    "jamba": Bound(11, 4, 0, 0, 0),
    "flex_olmo": Bound(9, 0, 0, 1, 2),
    "exaone_moe": Bound(4, 3, 6, 1, 0),
    "solar_open": Bound(3, 2, 0, 1, 0),
    "kimi_k25": Bound(10, 3, 0, 2, 1),
    "qwen3_5_moe_vl": Bound(3, 2, 2, 1, 2),
    "qwen3_vl_moe": Bound(3, 2, 4, 1, 1),
    "glm4v_moe": Bound(8, 3, 0, 1, 1),
    "axk1": Bound(12, 3, 0, 2, 0),
    "axk2": Bound(13, 0, 0, 2, 0),
    "aria_text": Bound(3, 2, 0, 1, 0),
    "cohere2_moe": Bound(0, 0, 0, 1, 3),
    "deepseek_v4": Bound(13, 0, 0, 1, 3),
    "glm5_next": Bound(14, 0, 0, 0, 6),
    "granitemoe_swa": Bound(5, 0, 0, 1, 2),
    "granitemoeshared": Bound(5, 0, 0, 1, 2),
    "granitemoehybrid": Bound(6, 0, 0, 1, 2),
    "hy_v3": Bound(4, 3, 6, 1, 0),
    "hy_v4": Bound(13, 0, 0, 1, 3),
    "inkling": Bound(10, 0, 0, 0, 2),
    "laguna": Bound(4, 3, 6, 1, 0),
    "mellum": Bound(3, 2, 4, 1, 0),
    "minimax": Bound(6, 0, 0, 1, 2),
    "minimax_m3_vl": Bound(4, 3, 6, 1, 0),
    "mistral4": Bound(7, 2, 0, 2, 0),
    "openai_privacy_filter": Bound(3, 2, 0, 1, 0),
    "qwen4_exp": Bound(4, 0, 0, 1, 6),
    "zaya": Bound(7, 0, 0, 1, 4),
    "ernie4_5_vl_moe": Bound(5, 3, 0, 1, 1),
    "qwen3_omni_moe": Bound(3, 2, 4, 1, 1),
    "qwen3_omni_moe_whole": Bound(3, 2, 4, 1, 1),
    "deepseek_ocr2": Bound(7, 3, 0, 1, 0),
    "step3p7": Bound(4, 3, 6, 1, 0),
    "longcat_flash": Bound(17, 0, 0, 1, 4),
    "llama4": Bound(3, 2, 0, 0, 0),
    "dbrx": Bound(0, 0, 0, 1, 0),
}
