"""Sees every matrix product with a router's weight, without knowing the router's formula.

Whatever a router computes, its scores come from one matrix product with its weight, which some
routers transpose or cast at every call.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

Router = TypeVar("Router")

# Products whose second operand is the weight.
_PRODUCTS = frozenset(
    {
        torch.nn.functional.linear,
        torch.matmul,
        torch.mm,
        Tensor.matmul,
        Tensor.mm,
        Tensor.__matmul__,
    }
)


class RouterProducts(TorchFunctionMode, Generic[Router]):
    """Inside this context, products with routers' weights go through `product`.

    Args:
        routers: the weight of each router, and what identifies it.
    """

    def __init__(self, routers: Sequence[tuple[Tensor, Router]]) -> None:
        super().__init__()
        # Weights and tensors derived from them.
        self._routers = WeakIdKeyDictionary(dict(routers))

    @abstractmethod
    def product(self, out: Tensor, router: Router) -> Tensor:
        """What takes the place of a product [..., rows of the weight] with a router's weight."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        if func in _PRODUCTS:
            weight = args[1] if len(args) > 1 else next(iter(kwargs.values()), None)
            router = self._routers.get(weight) if isinstance(weight, Tensor) else None
            return out if router is None else self.product(out, router)
        source = args[0] if args else None
        if isinstance(source, Tensor) and out.shape in (source.shape, source.shape[::-1]):
            router = self._routers.get(source)
            if router is not None:
                self._routers[out] = router
        return out
