"""Gate formulas are recognized by value, with the module's own constants."""

import pytest
import torch
from torch.nn import functional

import reap_kernels as rk
from reap_kernels.testing import ACTIVATIONS


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("limit", [0.7, 7.0, 10.0])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
def test_probe_finds_the_formula(activation, limit: float, interleaved: bool) -> None:
    limited = activation.limit != float("inf")
    activation = rk.Activation(activation.kind, limit if limited else float("inf"))
    found = rk.probe_activation(
        lambda projected: activation.apply(projected, interleaved=interleaved),
        intermediate_size=24,
        gated=activation.gated,
        interleaved=interleaved,
        limits=[limit, float("inf")],
        alphas=[1.702],
    )
    assert found == activation


def test_probe_tells_limits_and_slopes_apart() -> None:
    own = rk.Activation("swiglu_oai", 5.0, 1.5)
    found = rk.probe_activation(
        own.apply, intermediate_size=8, gated=True, limits=[7.0, 5.0], alphas=[1.702, 1.5]
    )
    assert found == own
    unlimited = rk.Activation("swiglu_oai")
    assert rk.probe_activation(unlimited.apply, intermediate_size=8, gated=True) == unlimited


@pytest.mark.parametrize(
    "act",
    [
        functional.gelu,
        torch.relu,
        lambda x: functional.gelu(x, approximate="tanh") * 1.01,
        lambda x: functional.silu(x).clamp(max=6.9),
    ],
)
def test_anything_else_is_opaque(act) -> None:
    def own(projected):
        gate, up = projected.chunk(2, dim=-1)
        return act(gate) * up

    found = rk.probe_activation(own, intermediate_size=8, gated=True, limits=[7.0])
    assert found.kind == "opaque"
    assert found.fn is own
