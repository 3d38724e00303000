"""What an observed forward computes beside the experts: few operations, and none read by the host.

On a GPU each is a kernel that the host launches.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reap_driver as rd
from reap_driver.model.forward import forward
from reap_driver.observation import layer_recorder
from tests.driver import zoo


class _Launches(TorchDispatchMode):
    """Names of the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        if not func.is_view and not name.startswith(("empty", "detach")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _beside(layers: int, monkeypatch: pytest.MonkeyPatch, **batch: Any) -> list[str]:
    """Operations of a third observed forward that the plain one does not have, without those of
    `observe_layer`.
    """
    config, model = zoo.tiny("qwen3_moe", num_hidden_layers=layers)
    inputs = {**zoo.tiny_inputs("qwen3_moe", config), **batch}

    def nothing(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden

    with rd.observe(model) as obs:
        obs(**inputs)
        obs(**inputs)
        with monkeypatch.context() as patched, _Launches() as observed:
            patched.setattr(layer_recorder, "observe_layer", nothing)
            obs(**inputs)
    inputs.pop("token_mask", None)
    with monkeypatch.context() as patched, _Launches() as plain:
        experts = type(model.model.layers[0].mlp.experts)
        patched.setattr(experts, "forward", lambda _, hidden, *__: hidden)
        forward(model, inputs)
    names = list(observed.names)
    for name in plain.names:
        names.remove(name)
    return sorted(names)


@pytest.mark.parametrize("layers", [2, 6])
def test_a_layer_has_one_small_operation_beside_its_experts(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of its router weights. What holds statistics that a failed forward would spoil, and
    adds the sums, is done for all layers together.
    """
    found = _beside(layers, monkeypatch)
    assert found == ["_foreach_add_", *3 * ["_foreach_copy_"], *layers * ["sum"]]


def test_a_layer_of_masked_tokens_has_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """And reading a mask costs the same for any number of layers."""
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    few, many = (_beside(layers, monkeypatch, token_mask=mask) for layers in (2, 6))
    for _ in range(4):
        few += ["scalar_tensor", "sum", "where"]
    assert sorted(few) == many
