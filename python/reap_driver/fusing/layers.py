"""Which layers add the output of one child to their input and give the sum to a norm.

A layer is run on made inputs, its children replaced by stubs that record what they are given and
return known tensors. It fits where it computes, to the bit,

    middle = h + first(norm1(h)),   output = middle + second(norm2(middle))
"""

import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reap_driver.fusing.probing import Made, line, run_forward, with_stubs

_RETURNS = ("tensor", "pair", "triple")


@dataclass(frozen=True)
class PreNorm:
    """The children of a layer that fits.

    Attributes:
        branch: name of the child whose output is added to the layer's input.
        norm: name of the norm of that sum.
    """

    branch: str
    norm: str


def pre_norm(layer: nn.Module, norms: Collection[str], width: int) -> PreNorm | str:
    """The children of a layer between which a sum is normalized.

    Args:
        layer: a decoder layer, on any device: none of its parameters is used.
        norms: names of its children that are RMS norms of the hidden states.
        width: H, of the hidden states.

    Returns:
        The children; or why the layer does not fit.
    """
    reasons: dict[int, str] = {}  # by the number of children that were called
    for first, second in itertools.product(_RETURNS, _RETURNS):
        trial = _Trial(layer, norms, width, (first, second))
        try:
            return trial.run()
        except _Other as other:
            return str(other)
        except Exception as error:  # noqa: BLE001 - whatever a model's code does with what a stub returns
            reasons.setdefault(trial.calls, f"cannot run on stubs of its children ({line(error)})")
    return reasons[max(reasons)]


class _Other(Exception):
    """The layer runs, and computes something else."""


class _Trial:
    """One run of a layer on stubs, which return tensors or tuples that begin with one."""

    def __init__(
        self, layer: nn.Module, norms: Collection[str], width: int, returns: tuple[str, str]
    ) -> None:
        self._norms, self._returns = norms, returns
        self._made = Made()
        self._shape = (1, 3, width)
        self._calls: list[tuple[str, list[Any], Tensor]] = []
        self._layer = with_stubs(layer, lambda name, _: functools.partial(self.called, name))

    @property
    def calls(self) -> int:
        """How often children were called."""
        return len(self._calls)

    def called(self, name: str, *given: Any) -> Any:
        """What the stub of a child returns."""
        out = self._made.normal(*self._shape)
        self._calls.append((name, list(given), out))
        if name in self._norms:
            return out
        kind = self._returns[sum(called not in self._norms for called, _, _ in self._calls) > 1]
        return {"tensor": out, "pair": (out, None), "triple": (out, None, None)}[kind]

    def run(self) -> PreNorm:
        """The children, if the layer fits.

        Raises:
            _Other: it does not.
        """
        hidden = self._made.normal(*self._shape)
        result = run_forward(self._layer, hidden.clone())
        result = result[0] if isinstance(result, tuple) else result
        names = [name for name, _, _ in self._calls]
        norms = [name in self._norms for name in names]
        if norms != [True, False, True, False]:
            raise _Other(f"calls its children in another order ({', '.join(names)})")
        middle = hidden + self._calls[1][2]
        expected = (hidden, self._calls[0][2], middle, self._calls[2][2])
        for (name, given, _), value in zip(self._calls, expected, strict=True):
            if not any(isinstance(one, Tensor) and torch.equal(one, value) for one in given):
                raise _Other(f"gives {name} something else than a sum or norm of what comes before")
        if not isinstance(result, Tensor) or not torch.equal(result, middle + self._calls[3][2]):
            raise _Other("does not return the sum of its residual and its last child's output")
        return PreNorm(names[1], names[2])
