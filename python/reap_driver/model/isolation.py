"""Which models can keep documents apart that are packed into one sequence, and how.

An attention mask, which transformers makes, keeps attention within a document. Information that a
model passes between tokens in other ways crosses the boundary: the state of a linear attention or
state-space layer, the window of a convolution, the selection of keys by a sparse indexer.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from reap_driver.compat.packed_attention import documents_of, never_packed, packed
from reap_kernels.errors import UnsupportedModel

# `model_type` of text models for which a test shows that a document has the same logits packed and
# alone. A model in neither table is refused because it has not been tested.
_APART = {
    "afmoe",
    "aria_text",
    "axk1",
    "cohere2_moe",
    "dbrx",
    "deepseek_ocr2_text",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "ernie4_5_vl_moe_text",
    "exaone_moe",
    "flex_olmo",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe_text",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "laguna",
    "llama4_text",
    "longcat_flash",
    "mellum",
    "mimo_v2_flash",
    "minimax_m2",
    "mistral4",
    "mixtral",
    "olmoe",
    "openai_privacy_filter",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "solar_open",
    "step3p5",
}
_LINEAR = "its linear attention carries a state"
_SPACE = "its state-space layers carry a state"
_CONVOLUTION = "its convolutions look back"
_SPARSE = "its sparse attention chooses keys"
_CROSSING = {
    "axk2": _SPARSE,
    "deepseek_v32": _SPARSE,
    "deepseek_v4": _SPARSE,
    "glm5_next_text": _LINEAR,
    "glm_moe_dsa": _SPARSE,
    "granitemoehybrid": _SPACE,
    "hy_v4": _SPARSE,
    "inkling_text": _CONVOLUTION,
    "jamba": _SPACE,
    "kimi_linear": _LINEAR,
    "lfm2_moe": _CONVOLUTION,
    "minimax": _LINEAR,
    "minimax_m3_vl_text": _SPARSE,
    "nemotron_h": _SPACE,
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": _LINEAR,
    "zaya": _CONVOLUTION,
}
# Implementations of attention that always accept a mask.
_MASKED = ("eager", "sdpa")


def check_isolation(config: PretrainedConfig) -> None:
    """Checks that documents packed into one sequence can be kept apart.

    Args:
        config: configuration of the model, with the implementation of attention that it uses.

    Raises:
        UnsupportedModel: they cannot, or it has not been tested.
    """
    text = config.get_text_config()
    kind, remedy = text.model_type, "pack with `packing='concat'`, which joins them, or none"
    if kind in _CROSSING:
        raise UnsupportedModel(
            f"{kind} cannot keep documents packed in one sequence apart: {_CROSSING[kind]} across "
            f"their boundaries; {remedy}"
        )
    if kind not in _APART:
        raise UnsupportedModel(
            f"whether {kind} keeps documents packed in one sequence apart is not known; {remedy}"
        )
    if text._attn_implementation not in _MASKED:
        raise UnsupportedModel(
            f"attention {text._attn_implementation!r} takes no mask that keeps documents packed in "
            f"one sequence apart; load the model with one of {', '.join(_MASKED)}, or {remedy}"
        )


def documents_apart(
    config: PretrainedConfig, batch: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Inside, a forward on the batch keeps its packed documents apart.

    Args:
        config: configuration of the model.
        batch: arguments of the model. Documents are packed if there is no attention mask and
            `position_ids` [batch, seq] restart inside a row.

    Raises:
        UnsupportedModel: the model cannot keep them apart.
    """
    if set(batch) == {"input_ids"}:
        return never_packed()
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return nullcontext()
    documents = documents_of(positions) if batch.get("attention_mask") is None else None
    if documents is None:
        return nullcontext()
    check_isolation(config)
    return packed(documents)
