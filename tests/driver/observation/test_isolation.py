"""Packed documents give the logits and statistics of each document alone, or are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from reap_driver.compat.text_model import text_model
from reap_driver.model import isolation
from reap_driver.model.isolation import check_isolation, documents_apart
from reap_driver.observation.observer import observe
from reap_kernels.errors import UnsupportedModel
from tests.driver import zoo
from tests.driver.observation.test_architectures import Support

LENGTHS = [1, 12, 5, 18]
NO_SDPA = {
    "deepseek_v4",
    "gpt_oss",
    "granitemoe_swa",
    "hy_v4",
    "mimo_v2_flash",
    "openai_privacy_filter",
}
OWN_MASKS = {"glm5_next"}
# Sparse attention selects few keys or short blocks, fewer than a document has, so that it could
# select across a boundary.
NARROW: dict[str, dict[str, Any]] = {
    "axk2": {"index_topk": 4},
    "deepseek_v32": {"index_topk": 4},
    "deepseek_v4": {
        "index_topk": 4,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "glm5_next": {"index_topk": 4},
    "glm_moe_dsa": {"index_topk": 4},
    "hy_v4": {"index_topk": 4},
    "minimax_m3_vl": {
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    },
    "qwen4_exp": {"index_topk": 4},
}


def _packed(name: str, attention: str = "eager") -> tuple[PreTrainedModel, Tensor, Tensor]:
    """A model, ids [2, 36] and the positions of the documents in them."""
    config, model = zoo.tiny(name, dtype=torch.float64, **NARROW.get(name, {}))
    model.set_attn_implementation(attention)
    ids = zoo.tiny_inputs(name, config, 2, sum(LENGTHS))["input_ids"]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return model, ids, positions.expand(2, -1)


def _kind(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config().model_type)


def _logits(model: PreTrainedModel, **batch: Tensor) -> Tensor:
    with torch.no_grad(), documents_apart(model.config, batch):
        return text_model(model)(**batch, use_cache=False).logits


def _error(model: PreTrainedModel, ids: Tensor, packed: Tensor) -> float:
    """Largest difference of the packed logits from those of the documents alone, relative.

    A query whose keys are all chosen in other documents has none left, and NaN for logits.
    """
    alone = [_logits(model, input_ids=part) for part in ids.split(LENGTHS, dim=1)]
    parts = zip(alone, packed.nan_to_num(torch.inf).split(LENGTHS, dim=1), strict=True)
    return max(float((a - p).abs().max() / a.abs().max()) for a, p in parts)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", zoo.names())
def test_packed_documents_have_the_logits_of_each_alone(
    name: str, attention: str, support: Support, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that the tables list are exact; the others are refused, and would not be.

    Attention is in float32: errors are 1e-7, while attending across a boundary causes 0.1 or more.
    """
    if attention == "sdpa" and name in NO_SDPA:
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            _packed(name, attention)
        return
    model, ids, positions = _packed(name, attention)
    if _kind(model) in isolation._APART:
        packed = _logits(model, input_ids=ids, position_ids=positions)
        assert _error(model, ids, packed) < 1e-5
        assert _error(model, ids, _logits(model, input_ids=ids)) > 1e-2
        support(name, "isolated documents", "pass")
        return
    with pytest.raises(UnsupportedModel, match="cannot keep documents packed in one sequence apa"):
        _logits(model, input_ids=ids, position_ids=positions)
    support(name, "isolated documents", "refused")
    monkeypatch.setattr(isolation, "_APART", {_kind(model)})
    monkeypatch.setattr(isolation, "_CROSSING", {})
    if name in OWN_MASKS:
        with pytest.raises(
            UnsupportedModel, match="does not take its attention mask from the library"
        ):
            _logits(model, input_ids=ids, position_ids=positions)
    else:
        packed = _logits(model, input_ids=ids, position_ids=positions)
        assert _error(model, ids, packed) > 1e-2


def test_statistics_of_packed_documents_are_those_of_each_alone() -> None:
    model, ids, positions = _packed("qwen3_moe")
    with observe(model) as packed:
        packed(input_ids=ids, position_ids=positions)
    with observe(model) as alone:
        for part in ids.split(LENGTHS, dim=1):
            alone(input_ids=part)
    for name, layer in packed.stats.layers.items():
        other = alone.stats.layers[name]
        assert torch.equal(layer.counts, other.counts)
        torch.testing.assert_close(layer.sums, other.sums, rtol=1e-6, atol=0)


def test_one_document_a_row_is_nothing_to_keep_apart() -> None:
    """Position ids without packed documents are passed to every model."""
    model, ids, _ = _packed("qwen3_next")
    with observe(model) as obs:
        obs(input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(2, -1))
    assert int(next(iter(obs.stats.layers.values())).tokens.sum()) == ids.numel()


def test_an_observation_of_packed_documents_is_refused() -> None:
    model, ids, positions = _packed("qwen3_next")
    with (
        observe(model) as obs,
        pytest.raises(
            UnsupportedModel,
            match=r"qwen3_next cannot keep .*: its linear attention carries a state across",
        ),
    ):
        obs(input_ids=ids, position_ids=positions)


def test_unknown_models_and_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = zoo.tiny("qwen3_moe")
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match=r"'flash_attention_2' takes no mask .* eager, sdpa"):
        check_isolation(config)
    monkeypatch.setattr(isolation, "_APART", set())
    with pytest.raises(UnsupportedModel, match=r"whether qwen3_moe keeps .* apart is not known"):
        check_isolation(config)


def test_the_library_is_left_as_it_was() -> None:
    """Also by a forward that fails."""
    before = (masking_utils._preprocess_mask_arguments, masking_utils.find_packed_sequence_indices)
    model, ids, positions = _packed("qwen3_moe")
    with pytest.raises(IndexError):
        _logits(model, input_ids=ids + 10_000, position_ids=positions)
    after = (masking_utils._preprocess_mask_arguments, masking_utils.find_packed_sequence_indices)
    assert before == after
