"""Weights that exist only while their module runs: accelerate's offloading, and a stand-in."""

import functools
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from reap_driver.observation.observer import observe
from reap_kernels.stats import COUNTS, EXTREMA, SUMS
from tests.driver import zoo


def offload(module: nn.Module) -> None:
    """Keeps a module's weights on meta outside its forward.

    As accelerate does: the instance's forward is saved as `_old_forward` and replaced by one that
    restores the weights, calls it, and removes the weights again.
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
    """The same bits as with resident weights, which are offloaded again afterwards."""
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


def device_map(model: Any) -> dict[str, str]:
    """Every second decoder layer on disk, the last among them; the rest in memory."""
    layers = len(model.model.layers)
    resident = [name for name, _ in model.model.named_children() if name != "layers"]
    return {
        **dict.fromkeys(["lm_head", *(f"model.{name}" for name in resident)], "cpu"),
        **{f"model.layers.{i}": ("disk", "cpu")[(layers - 1 - i) % 2] for i in range(layers)},
    }


ON_DISK = ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "step3p7"]


@pytest.mark.parametrize(
    ("name", "everything"),
    # All of llama4 runs nowhere: it moves the ids to where its embeddings are, which is nowhere.
    [(name, False) for name in ON_DISK] + [(name, True) for name in ON_DISK if name != "llama4"],
)
def test_layers_on_disk(name: str, everything: bool, tmp_path: Path) -> None:
    """Loaded by transformers with a device map: observed in place, equal to resident.

    In float64, to 1e-12: matrix products round differently at another alignment in memory, which
    differs between files that accelerate maps into it.
    """
    config, model = zoo.tiny(name, dtype=torch.float64)
    inputs = zoo.tiny_inputs(name, config)
    with observe(model) as resident:
        want = resident(**inputs).logits
    model.save_pretrained(tmp_path / "model")
    on_disk = type(model).from_pretrained(
        tmp_path / "model",
        dtype=torch.float64,
        attn_implementation="eager",
        device_map={"": "disk"} if everything else device_map(model),
        offload_folder=tmp_path / "offloaded",
    )
    away = {key for key, value in on_disk.named_parameters() if value.device.type == "meta"}
    with observe(on_disk.eval()) as obs:
        got = obs(**inputs).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert list(obs.stats.layers) == list(resident.stats.layers)
    placed = set()
    for layer in obs.layers:
        gone = [f"{layer.name}.{key}" in away for key, _ in layer.module.named_parameters()]
        placed |= set(gone)
        mine, theirs = (s.layers[layer.name].fields() for s in (obs.stats, resident.stats))
        assert all(torch.equal(mine[key], theirs[key]) for key in (*COUNTS, "tokens"))
        for key in (*SUMS, *EXTREMA):
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-12, atol=0)
    assert placed == ({True} if everything else {True, False})
    assert away == {k for k, v in on_disk.named_parameters() if v.device.type == "meta"}
