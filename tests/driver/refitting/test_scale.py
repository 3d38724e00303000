"""The factor of a layer's experts: measured in every dtype, and told from other functions."""

import pytest
import torch
from torch import Tensor

from reap_driver.refitting.scale import factor_of, perturbation, response
from reap_kernels.errors import UnsupportedModel

TOKENS, HIDDEN = 96, 64
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def layer(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A residual stream whose tokens differ in size, with some large numbers, and an output."""
    generator = torch.Generator().manual_seed(0)
    stream, out = torch.randn(2, TOKENS, HIDDEN, generator=generator)
    stream *= torch.linspace(0.5, 4, TOKENS)[:, None]
    stream[:, 3] *= 50
    return stream.to(dtype), out.to(dtype)


def measured(dtype: torch.dtype, function: object) -> float:
    """The factor of a layer that adds a function of its experts' output to the stream."""
    stream, out = layer(dtype)
    before = stream + function(out)
    added = perturbation(before)
    after = stream + function((out.float() + added).to(dtype))
    return factor_of("layers.3", response(added, before, after), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.22, 0.97, 1.75])
def test_a_factor_is_measured(dtype: torch.dtype, factor: float) -> None:
    assert measured(dtype, lambda out: factor * out) == pytest.approx(factor, rel=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_one_is_exact(dtype: torch.dtype) -> None:
    assert measured(dtype, lambda out: out) == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "function",
    [
        lambda out: out / out.square().mean(1, keepdim=True).sqrt(),
        lambda out: out * torch.linspace(0.5, 1.5, HIDDEN).to(out.dtype),
        lambda out: out.tanh(),
        lambda out: 0 * out,
    ],
    ids=["norm", "weights", "curve", "nothing"],
)
def test_other_functions_are_refused(dtype: torch.dtype, function: object) -> None:
    with pytest.raises(UnsupportedModel, match=r"layers\.3 does more"):
        measured(dtype, function)
