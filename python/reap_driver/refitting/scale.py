"""Measures by which factor a decoder layer multiplies the output of its experts."""

import torch
from torch import Tensor

from reap_kernels.errors import UnsupportedModel

# Largest accepted share of a change that is not explained by a factor. Rounding causes at most a
# tenth of each, a norm after the experts more than 0.2.
_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}

# A factor so near 1 is 1: over all tokens and numbers, rounding moves it much less, and so near it
# would not matter.
_NEAR_ONE = 1e-3


def perturbation(hidden: Tensor) -> Tensor:
    """What is added to the experts' output of every token: float32 [T, H].

    It has the size of the layer's output, so that it is not lost in rounding; half and twice that
    for a third of the tokens each, so that a norm after the experts shows.

    Args:
        hidden: [T, H], the layer's output.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    size = hidden.float().square().mean(dim=1, keepdim=True).sqrt()
    times = 2.0 ** (torch.arange(len(hidden), device=hidden.device) % 3 - 1)
    return noise * size * times[:, None]


def response(added: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Sums, which add over ranks, of added^2, added x change and change^2: float64 [3], on the CPU.

    Args:
        added: float32 [T, H], to the experts' output.
        before, after: [T, H], the layer's output without and with it.
    """
    change, wide = after.double() - before.double(), added.double()
    sums = wide.square().sum(), (wide * change).sum(), change.square().sum()
    return torch.stack(sums).cpu()


def factor_of(name: str, sums: Tensor, dtype: torch.dtype) -> float:
    """The factor by which a layer multiplies its experts' output; 1 where it cannot be told from 1.

    Args:
        name: of the layer.
        sums: see `response`.
        dtype: that the layer computes in.

    Raises:
        UnsupportedModel: the layer does more with the output than to multiply it.
    """
    added, both, change = sums.tolist()
    factor = both / added if added else 0.0
    rest = max(change - factor * both, 0.0)  # of the change, squared
    if not (factor and rest <= _TOLERANCE[dtype] ** 2 * change):
        raise UnsupportedModel(
            f"{name} does more with the output of its experts than to add a multiple of it to the "
            "residual stream, such as a norm after them, so what they lack is not known; use the "
            "model as it was pruned, or remove neurons too (`shape`), which corrects experts one "
            "by one"
        )
    return 1.0 if abs(factor - 1) < _NEAR_ONE else factor
