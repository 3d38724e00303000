"""What a norm computes, found from its outputs on made inputs.

The formula, of x [.., H] with a weight [H]:

    y = x_hat * (offset + weight),   x_hat = x / sqrt(mean(x^2) + eps)

where the models differ in eps, in the offset (0 or 1), and in whether x_hat is rounded to x's dtype
before the product. No class is known by its name.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import reap_kernels
from reap_driver.fusing.probing import Made, line

# Largest error of an element, in units of the dtype's precision; and the smallest share of elements
# of 16 bits that must be equal: two orders of rounding give others to a fourth of them.
_ULPS = 4
_EQUAL = 0.95
_ROWS = 24


@dataclass(frozen=True)
class NormFormula:
    """An RMS norm, as `reap_kernels.rms_norm` takes it.

    Attributes:
        eps: added to the mean of squares.
        offset: added to the weight.
        round_first: whether x_hat is rounded to the input's dtype before it is multiplied.
    """

    eps: float
    offset: float
    round_first: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `rms_norm` and `rotary`."""
        return {"eps": self.eps, "offset": self.offset, "round_first": self.round_first}

    def __call__(self, x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
        """The norm of x [.., H]."""
        out: Tensor = reap_kernels.rms_norm(
            x, weight, self.eps, offset=self.offset, round_first=self.round_first, backend=backend
        )
        return out


def is_candidate(module: nn.Module) -> bool:
    """Whether a module has one vector of parameters, and no other state."""
    parameters = list(module._parameters.values())
    return (
        not module._modules
        and not module._buffers
        and len(parameters) == 1
        and parameters[0] is not None
        and parameters[0].dim() == 1
    )


def norm_formula(module: nn.Module, dtype: torch.dtype) -> NormFormula | str:
    """What a candidate computes.

    Args:
        module: a norm with one vector [H] of parameters, which may be on the meta device: a copy
            with made weights on the CPU runs, in `dtype` and in float32.
        dtype: of the model's activations.

    Returns:
        The formula; or why there is none.

    Example:
        >>> norm_formula(model.model.norm, torch.bfloat16)
        NormFormula(eps=1e-06, offset=0.0, round_first=True)
    """
    made = Made()
    [(name, parameter)] = module._parameters.items()
    assert parameter is not None
    width = len(parameter)
    weight = 1 + 0.5 * made.normal(width)
    wide = _with_weight(module, name, weight)
    try:
        with torch.no_grad():
            found = _solved(wide, weight, module)
            if isinstance(found, str):
                return found
            x = _inputs(width, made)
            narrow = _with_weight(module, name, weight.to(parameter.dtype))
            rows = [(wide, weight, x), (narrow, weight.to(parameter.dtype), x.to(dtype))]
            return _verified(found, rows)
    except Exception as error:  # noqa: BLE001 - whatever a model's code does on an input that it does not take
        return f"cannot be run by itself on rows of {width} numbers ({line(error)})"


def _with_weight(module: nn.Module, name: str, weight: Tensor) -> nn.Module:
    """A copy that shares everything with a module but its weight and its hooks."""
    made = copy.copy(module)
    made.__dict__["_parameters"] = {name: nn.Parameter(weight, requires_grad=False)}
    made.__dict__.pop("forward", None)
    return made


def _inputs(width: int, made: Made) -> Tensor:
    """Rows [24, H] of other means and of scales from 0.001 to 100."""
    scale = torch.logspace(-3, 2, _ROWS, dtype=torch.float32, device="cpu")[:, None]
    return scale * (0.3 + made.normal(_ROWS, width))


def _solved(norm: nn.Module, weight: Tensor, module: nn.Module) -> tuple[float, float] | str:
    """eps and offset, from rows of one number each."""
    ones = torch.ones_like(weight)[None]
    scale = norm(8.0 * ones)
    if not isinstance(scale, Tensor) or scale.shape != ones.shape:
        return "returns something else than a tensor of its input's shape"
    offset = next((o for o in (0.0, 1.0) if _close(scale - weight - o)), None)
    if offset is None:
        return "does not give rows of equal numbers its weight, or 1 + its weight"
    eps = 0.0
    for size in (1e-3, 1e-5):
        ratio = float((norm(size * ones) / scale).mean())
        if not 0 < ratio < 1 + 1e-5:
            return "does not divide by the root of a mean of squares"
        if ratio < 1 - 1e-4:
            eps = size**2 * (ratio**-2 - 1)
            break
    # The number itself, where the module holds it: what was solved has a relative error of 1e-5.
    held = (value for value in vars(module).values() if isinstance(value, float))
    return next((value for value in held if math.isclose(value, eps, rel_tol=1e-2)), eps), offset


def _close(difference: Tensor) -> bool:
    return bool(difference.abs().max() < 1e-4)


def _verified(
    found: tuple[float, float], rows: list[tuple[nn.Module, Tensor, Tensor]]
) -> NormFormula | str:
    """The formula with the order of rounding whose values are those of the module."""
    for round_first in (False, True):
        formula = NormFormula(*found, round_first)
        # On the CPU, whatever backend the process asks for elsewhere.
        if all(same(norm(x), formula(x, weight, "cpu")) for norm, weight, x in rows):
            return formula
    return "computes something else than an RMS norm: outputs differ on random inputs"


def same(own: Any, ours: Tensor) -> bool:
    """Whether values are those of the model but for the last bit of some."""
    if not isinstance(own, Tensor) or (own.shape, own.dtype) != (ours.shape, ours.dtype):
        return False
    far = (own - ours).abs() > _ULPS * torch.finfo(own.dtype).eps * own.abs() + 1e-30
    wide = own.dtype.itemsize > 2
    return not bool(far.any()) and (wide or float((own == ours).float().mean()) >= _EQUAL)
