"""Weights that exist only while their module runs: accelerate's offloading, and a model of it."""

import functools
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from reap_driver.observe import observe
from tests.driver import zoo


def offload(module: nn.Module) -> None:
    """Keep a module's own weights aside, on meta outside its forward.

    The way accelerate does: the forward found on the instance is kept as `_old_forward`, and a new
    one, set on the instance, brings the weights, calls it, and takes them away again.
    """
    weights = {
        key: value.detach() for key, value in module._parameters.items() if value is not None
    }
    if not weights:
        return

    def place(device: str) -> None:
        for key, weight in weights.items():
            placed = weight if device == "cpu" else weight.to("meta")
            module._parameters[key] = nn.Parameter(placed, requires_grad=False)

    own = module.forward
    module._old_forward = own

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        place("cpu")
        try:
            return module._old_forward(*args, **kwargs)
        finally:
            place("meta")

    module.forward = forward  # type: ignore[method-assign]
    place("meta")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "step3p7", "llama4"])
def test_offloaded_experts(name: str) -> None:
    """The same bits as with resident weights, and the weights are away again afterwards."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    with observe(model) as resident:
        want = resident(**inputs).logits
    for layer in resident.layers:
        offload(layer.module)
    with observe(model) as obs:
        got = obs(**inputs).logits
    assert torch.equal(got, want)
    for layer in obs.layers:
        assert all(p.device.type == "meta" for p in layer.module.parameters())
        mine, theirs = (s.layers[layer.name].fields() for s in (obs.stats, resident.stats))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_offloaded_by_accelerate(name: str) -> None:
    """accelerate's own hooks: the same bits as with resident weights."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config)
    with observe(model) as resident:
        want = resident(**inputs).logits
    accelerate.cpu_offload(model, torch.device("cpu"))
    with observe(model) as obs:
        got = obs(**inputs).logits
    assert torch.equal(got, want)
    for layer, stats in resident.stats.layers.items():
        assert torch.equal(stats.sums, obs.stats.layers[layer].sums)
