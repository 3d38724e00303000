"""Mask removed experts in a model's own routers, for any router, without knowing its formula.

Whatever a router computes, its per-expert numbers come out of one matrix product with its weight,
and what it adds for selection only comes from one vector per expert. So: rows of removed experts in
every product with a router's weight are set to -1e9 (the weight is recognised by its memory), and
so are removed entries of selection biases. Softmax then gives exactly 0, sigmoid gives 0, top-k
never selects them; -inf would make 0 * inf in some routers.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from reap_driver.checkpoint.derive import ExpertDim

_MASKED = -1e9
_PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}


class RouterMask(TorchFunctionMode):
    """Sets the outputs of removed experts wherever a router's weight is multiplied with."""

    def __init__(self, removed: Mapping[int, torch.Tensor], names: Mapping[int, str]) -> None:
        super().__init__()
        self.removed = removed  # address of a router's weight -> its removed rows
        self.unused = {names[address] for address in removed}  # routers not multiplied with yet
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            for arg in (*args, *(kwargs or {}).values()):
                address = arg.data_ptr() if isinstance(arg, torch.Tensor) else 0
                if address in self.removed:
                    self.unused.discard(self._names[address])
                    out = out.clone()
                    out[..., self.removed[address]] = _MASKED
        return out


@contextlib.contextmanager
def masked_routers(
    model: PreTrainedModel,
    experts: Mapping[str, ExpertDim],
    kept: Mapping[str, tuple[int, ...]],
    num_experts: int,
) -> Iterator[RouterMask]:
    """Mask the routers of `model` (biases are changed for good, so use a model of your own).

    Args:
        experts: which tensors hold experts.
        kept: kept ids by layer.
        num_experts: experts of a layer.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    removed = {}
    for name, dim in experts.items():
        rows = torch.tensor(sorted(set(range(num_experts)) - set(kept[dim.layer])))
        tensor = state[name]
        if name.startswith(dim.layer + "."):
            continue  # the experts themselves
        if dim.block == 1 and tensor.dim() == 2 and tensor.shape[0] > 1:
            removed[tensor.data_ptr()] = rows
        elif dim.block == 1 and tensor.numel() == tensor.shape[dim.dim] and "bias" in name:
            with torch.no_grad():
                tensor.index_fill_(dim.dim, rows, _MASKED)
    names = {state[name].data_ptr(): name for name in experts}
    with RouterMask(removed, names) as mask:
        yield mask
