"""Fused models have the outputs and statistics of the unfused ones, on every architecture."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reap_driver as rd
from reap_driver.model.forward import forward
from tests.driver import zoo
from tests.driver.fusing.expected import COUNTS, Bound

# Largest ||fused - unfused|| / ||unfused|| of the logits. In float32 a norm or rotation rounds once
# more or less, 6e-8 a layer, and experts of random weights multiply that by less than 100. In
# bfloat16 single elements may round to the other neighbor, 4e-3, in each of at most 4 layers.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = forward(model, inputs, all_logits=True).logits
    return found


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", zoo.names())
def test_outputs_are_those_of_the_model(name: str, dtype: torch.dtype) -> None:
    config, model = zoo.tiny(name, dtype=dtype)
    inputs = zoo.tiny_inputs(name, config)
    plain = logits(model, inputs)
    with rd.fused(model) as fused:
        outputs = [logits(model, inputs) for _ in range(2)]
    assert Bound(**fused.counts) == COUNTS[name], fused.left
    assert torch.equal(*outputs)
    error = (outputs[0].double() - plain.double()).norm() / plain.double().norm()
    assert float(error) <= BOUND[dtype]
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("name", zoo.core_names())
def test_statistics_are_those_of_the_model(name: str) -> None:
    """In float32, tokens reach the same experts, and sums differ by rounding."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    found = []
    for fuse in (False, True):
        with rd.observe(model, fuse=fuse) as obs:
            obs(**inputs)
        found.append(obs.stats)
    plain, fused = found
    assert "fused" not in plain.provenance
    expected = COUNTS[name]
    assert fused.provenance["fused"] == expected._asdict()
    for layer, stats in plain.layers.items():
        assert torch.equal(stats.counts, fused.layers[layer].counts)
        torch.testing.assert_close(fused.layers[layer].sums, stats.sums, rtol=1e-5, atol=0)


def test_the_order_of_rounding_is_found() -> None:
    """Llama's norms round before the product, Gemma's and gpt-oss's after it."""
    for name, first in [("qwen3_moe", True), ("qwen3_next", False), ("gpt_oss", False)]:
        _, model = zoo.tiny(name, dtype=torch.bfloat16)
        fused = rd.fused(model)
        with fused:
            formulas = {site.formula for site in fused._norms.values()}
        assert {formula.round_first for formula in formulas} == {first}
        assert {formula.offset for formula in formulas} == {float(name == "qwen3_next")}
        assert all(isinstance(module, nn.Module) for module in model.modules())
