"""The fixtures themselves: published fields and tensor names, and transformers loads them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from reap_driver.compat.models import load_model
from tests.driver.published.checkpoint import is_mtp
from tests.driver.published.expected import read_tensors
from tests.driver.published.models import MODELS
from tests.driver.published.reduce import get_field, published_config, small_config


@pytest.mark.parametrize("name", MODELS)
def test_small_config_keeps_what_routing_depends_on(name: str) -> None:
    entry, published, small = MODELS[name], published_config(name), small_config(name)
    routing = (
        *entry.counts,
        entry.top_k,
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "scoring_func",
    )
    for field in routing:
        assert get_field(small, field) == get_field(published, field)
    experts = get_field(small, entry.counts[0])
    assert entry.kept == experts - int(experts * entry.ratio)
    assert len(entry.moe_layers) >= 2


@pytest.mark.parametrize("name", MODELS)
def test_published_layout_loads(name: str, checkpoint: Callable[[str], Path]) -> None:
    """Every published tensor is read, but the MTP layers'; nothing is left to chance."""
    entry, config, folder = MODELS[name], small_config(name), checkpoint(name)
    tensors = read_tensors(folder)
    assert set(entry.names) <= tensors.keys()
    if entry.quantised == "fp8":
        assert any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values())
    cls = getattr(transformers, config["architectures"][0], None)
    if cls is None or entry.not_plain:
        model = load_model(folder)  # refuses missing tensors and unknown experts by itself
    else:
        model, loading = cls.from_pretrained(str(folder), output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["mismatched_keys"]
        assert all(is_mtp(key, entry, config) for key in loading["unexpected_keys"])
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
    assert logits.isfinite().all()
