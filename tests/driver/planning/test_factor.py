"""The constant factor a block applies to the routed sum after its experts, measured on the block.

What is added to the experts' output comes out of the block times the factor, whatever else the
block does, so `scale` of a layer's facts can be checked without knowing any block's code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reap_driver.compat.text_model import text_model
from reap_driver.model.discover import MoELayer, block_of, find_moe_layers
from tests.driver import zoo

# Where the factor is no constant, or not between the experts module and the end of the block.
_ELSEWHERE = {
    "gemma4": "a norm follows the routed sum",
    "axk1": "a norm follows the routed sum",
    "nemotron_h_latent": "a projection from the latent space follows the routed sum",
    "llama4": "the experts module returns every expert's output, not their sum",
}
_UNREACHED = {"ernie4_5_vl_moe": 2, "qwen3_omni_moe_whole": 2}  # vision experts see no text


@contextmanager
def added(layer: MoELayer, amount: Tensor | float, block: nn.Module) -> Iterator[list[Tensor]]:
    """Adds to every output of the experts; gives the block's outputs, [T, H]."""
    outputs: list[Tensor] = []

    def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + amount

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        whole = output if isinstance(output, Tensor) else output[0]
        outputs.append(whole.detach().reshape(-1, layer.hidden_size))

    handles = [layer.module.register_forward_hook(add), block.register_forward_hook(keep)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", [name for name in zoo.names() if name not in _ELSEWHERE])
def test_the_factor_is_what_the_block_does(name: str) -> None:
    config, model = zoo.tiny(name, dtype=torch.float64)
    inputs = zoo.tiny_inputs(name, config)
    reached = 0
    layers = find_moe_layers(model)
    for layer in layers:
        block = block_of(model, layer)
        direction = torch.randn(
            layer.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        found = []
        for amount in (0.0, direction):
            with added(layer, amount, block) as outputs, torch.no_grad():
                text_model(model)(**inputs, use_cache=False)
            found += outputs
        if not found:
            continue
        reached += 1
        plain, moved = found
        expected = (layer.scale * direction).expand_as(plain)
        # hy_v3 adds up in float32.
        torch.testing.assert_close(moved - plain, expected, rtol=0, atol=1e-5)
        assert layer.provenance()["scale"] == layer.scale
    assert len(layers) - reached == _UNREACHED.get(name, 0)


def test_some_factors_are_not_1() -> None:
    """Otherwise the measurement above would say little."""
    scales = {
        name: find_moe_layers(zoo.tiny(name)[1])[0].scale
        for name in ("laguna", "minimax_m3_vl", "step3p7", "openai_privacy_filter", "cohere2_moe")
    }
    assert set(scales.values()) == {1.75, 3.0, 0.5}
