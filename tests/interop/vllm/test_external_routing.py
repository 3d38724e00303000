"""A layer that is not given logits: vLLM's Transformers backend routes outside of it."""

from collections.abc import Iterator

import pytest
import torch

from reap_driver.integrations.vllm.engine import self_check
from reap_kernels.errors import UnsupportedModel
from tests.interop.vllm.in_process import Engine, running


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with running("hunyuan_v1_moe", tmp_path_factory.mktemp("hunyuan")) as found:
        yield found


def test_it_is_observed_and_not_masked(engine: Engine) -> None:
    assert self_check.check_layers(engine.layers.values(), engine.worker.vllm_config) == {}
    plain = engine.logprobs()
    assert torch.equal(engine.observe("shadow"), plain)
    for layer, expected in zip(engine.layers.values(), engine.stats.layers.values(), strict=True):
        assert layer.stats is not None
        assert torch.equal(layer.stats.count, expected.count)
        assert torch.allclose(layer.stats.sums, expected.sums, rtol=1e-5, atol=0)
        assert layer.refusal is None
        with pytest.raises(UnsupportedModel, match="given no logits; write the pruned checkpoint"):
            layer.set_mask([0])
        layer.set_mask([])  # what clears all layers changes nothing here
    assert torch.equal(engine.logprobs(), plain)
