"""Tensors whose values are computed later, by one kernel together with what uses them.

A model's own code adds a residual and then normalizes the sum, or normalizes queries and keys and
then rotates them. Between the two it holds a `Deferred`, which has the shape, dtype and device of
the value. The function that uses it next computes both in one kernel; everything else that touches
it gets the value, computed by then. So the model's code runs unchanged, whatever it does.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from reap_kernels.errors import UnsupportedModel

# What a tensor knows of itself without its values.
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
_FACTS = frozenset(getattr(Tensor, name).__get__ for name in _ATTRIBUTES) | frozenset(
    (Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point)
)
_ADDITIONS = frozenset((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__))


class Deferred(Tensor):
    """A tensor that is computed when its value is needed; a subclass says how."""

    _value: Tensor | None

    @staticmethod
    def _like(cls: "type[Deferred]", tensor: Tensor) -> Any:
        """An empty one with the shape, dtype, strides and device of a tensor."""
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            tensor.shape,
            strides=tensor.stride(),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        made._value = None
        return made

    def value(self) -> Tensor:
        """The value, a plain tensor; computed once."""
        if self._value is None:
            self.settle(self._computed())
        assert self._value is not None
        return self._value

    def settle(self, value: Tensor) -> None:
        """Gives the value, where a kernel computed it along with something else; what it would be
        computed from is let go of, since a layer keeps its residual for longer than that.
        """
        self._value = value
        self._let_go()

    def _computed(self) -> Tensor:
        raise NotImplementedError

    def _let_go(self) -> None:
        """Drops the operands."""

    def _taken(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The result of a function that leaves it deferred; `NotImplemented` for all others."""
        return NotImplemented

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        for arg in args:
            if isinstance(arg, Deferred):
                taken = arg._taken(function, args, kwargs)
                if taken is not NotImplemented:
                    return taken
        return function(*tree_map(plain, args), **tree_map(plain, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class Branch(Deferred):
    """The output of a layer's attention, which its code is about to add to the residual."""

    @staticmethod
    def of(output: Tensor) -> "Branch":
        """It, with its value."""
        made: Branch = Deferred._like(Branch, output)
        made.settle(output)
        return made

    def _taken(self, function: Any, args: Any, kwargs: Any) -> Any:
        if function not in _ADDITIONS or kwargs or len(args) != 2 or args[0] is args[1]:
            return NotImplemented
        other = args[1] if args[0] is self else args[0]
        output = self.value()
        if type(other) is not Tensor or other.shape != output.shape or other.dtype != output.dtype:
            return NotImplemented
        if other.is_inference() or output.is_inference():  # changes in place are not counted
            return NotImplemented
        return Sum.of(other, output)


class Sum(Deferred):
    """A residual and what is added to it, not added yet."""

    residual: Tensor
    added: Tensor
    _guard: "_Guard"

    @staticmethod
    def of(residual: Tensor, added: Tensor) -> "Sum":
        """The sum of two tensors of one shape and dtype."""
        made: Sum = Deferred._like(Sum, added)
        made.residual, made.added, made._guard = residual, added, _Guard(residual, added)
        return made

    @property
    def parts(self) -> tuple[Tensor, Tensor] | None:
        """Residual and what is added to it; None where the sum is computed already."""
        if self._value is not None:
            return None
        self._guard.check()
        return self.residual, self.added

    def _computed(self) -> Tensor:
        self._guard.check()
        return self.residual + self.added

    def _let_go(self) -> None:
        del self.residual, self.added, self._guard


class NormSource(Protocol):
    """What a `Normed` needs of the place it comes from.

    Attributes:
        formula: of the norm, for comparison with another's.
        rotations: number of calls that a rotation took over.
    """

    formula: Any
    rotations: int

    def computed_alone(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm, where nothing took it over."""
        ...


class Normed(Deferred):
    """Queries or keys with a norm over their last dimension, not normalized yet.

    Attributes:
        source: the input of the norm, with the same dimensions exchanged as this.
        site: where the norm is computed.
        own: the model's own code for it.
        weight: of the norm.
    """

    source: Tensor
    site: NormSource
    own: Callable[..., Any]
    weight: Tensor
    _guard: "_Guard"

    @staticmethod
    def of(source: Tensor, site: NormSource, own: Callable[..., Any], weight: Tensor) -> "Normed":
        """The norm of a tensor, whose result has its shape and dtype."""
        made: Normed = Deferred._like(Normed, source)
        made.source, made.site, made.own, made.weight = source, site, own, weight
        made._guard = _Guard(source)
        return made

    @property
    def pending(self) -> bool:
        """Whether the value is not computed yet."""
        if self._value is None:
            self._guard.check()
        return self._value is None

    def _computed(self) -> Tensor:
        self._guard.check()
        return self.site.computed_alone(self.source, self.weight)

    def _let_go(self) -> None:
        del self.source, self.own, self.weight, self._guard

    def _taken(self, function: Any, args: Any, kwargs: Any) -> Any:
        if function not in (Tensor.transpose, torch.transpose) or kwargs or len(args) != 3:
            return NotImplemented
        if self._value is not None:
            return NotImplemented
        last = self.source.dim() - 1
        first, second = (place % (last + 1) for place in args[1:])
        if last in (first, second):
            return NotImplemented
        source = self.source.transpose(first, second)
        return Normed.of(source, self.site, self.own, self.weight)


def plain(value: Any) -> Any:
    """The value of a deferred tensor; anything else as it is."""
    return value.value() if isinstance(value, Deferred) else value


class _Guard:
    """Notices that the operands of a deferred tensor were changed in place before their use."""

    def __init__(self, *operands: Tensor) -> None:
        self._operands = operands
        self._versions = [one._version for one in operands]

    def check(self) -> None:
        """Raises UnsupportedModel if one was."""
        if [one._version for one in self._operands] != self._versions:
            raise UnsupportedModel(
                "the model changes a residual, query or key in place before it uses what was "
                "computed from it; run it outside rd.fused(), or with `fuse=False`"
            )
