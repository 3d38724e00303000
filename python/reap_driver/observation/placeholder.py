"""Tensors without values, in place of the outputs of layers that are skipped."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reap_kernels.errors import UnsupportedModel


def leaves(value: Any) -> Iterator[Any]:
    """All values in nested mappings, lists and tuples."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def placeholder_like(value: Any, device: torch.device | None = None) -> Any:
    """The value with every tensor replaced by a placeholder of the same shape, strides and dtype.

    Args:
        value: a tensor, or lists, tuples and dicts of tensors.
        device: the device that the placeholders report; None for each tensor's own.
    """
    if isinstance(value, Tensor):
        return Placeholder.like(value, device)
    # torch.max and the like return tuples of their own types.
    if type(value) in (list, tuple) or hasattr(type(value), "n_sequence_fields"):
        return type(value)([placeholder_like(item, device) for item in value])
    if type(value) is dict:
        return {key: placeholder_like(item, device) for key, item in value.items()}
    return value


class Placeholder(Tensor):
    """A tensor without values, on the meta device; everything computed from it is one too.

    Stands for the output of a skipped layer. If the model uses that output anywhere but in the next
    layer, the placeholder reaches code that needs values, and the model is refused.
    """

    _reported: torch.device | None = None

    @staticmethod
    def like(tensor: Tensor, device: torch.device | None = None) -> "Placeholder":
        """A placeholder of a tensor's shape, strides and dtype that reports this device."""
        with torch._C.DisableTorchFunctionSubclass():
            made = Tensor._make_subclass(Placeholder, tensor.detach().to("meta"))
            made._reported = tensor.device if device is None else device
            return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", str(func))
            if name == "__get__":  # attributes: shape and dtype, but also .mT and .data
                reported = getattr(args[0], "_reported", None)
                if reported is not None and getattr(func, "__self__", None) is Tensor.device:
                    return reported
                return placeholder_like(func(*args, **(kwargs or {})), reported)
            if name in ("__getitem__", "__setitem__"):
                args = (args[0], _positions(args[1]), *args[2:])
            given = [leaf for leaf in leaves([args, kwargs or {}]) if isinstance(leaf, Tensor)]
            reported = next(
                (leaf._reported for leaf in given if isinstance(leaf, Placeholder)), None
            )
            copies: dict[int, Tensor] = {}
            known = {key: _on_meta(item, copies) for key, item in (kwargs or {}).items()}
            if "device" in known:
                known["device"] = "meta"
            try:
                result = func(*_on_meta(args, copies), **known)
            except Exception as error:
                raise _used(f"{name}: {error}") from error
            if any(copy._version for copy in copies.values()):
                raise _used(f"{name} writes it to another tensor")
            return placeholder_like(result, reported)


def _positions(index: Any) -> Any:
    """An index with boolean masks replaced by positions, whose number gives the result's shape."""
    found: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        mask = isinstance(part, Tensor) and part.dtype is torch.bool
        known = mask and not isinstance(part, Placeholder) and not part.is_meta
        found += part.nonzero(as_tuple=True) if known else [part]
    return tuple(found)


def _used(how: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the model uses the output of a layer in more than the next layer ({how}); observe the "
        "model with `stream='never'`"
    )


def _on_meta(value: Any, copies: dict[int, Tensor]) -> Any:
    """The value with all tensors and devices on meta; `copies` collects those of real tensors."""
    if isinstance(value, Placeholder) and value.is_meta:
        return value.detach().as_subclass(Tensor)
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
        return copies[id(value)]
    if isinstance(value, torch.device):
        return torch.device("meta")
    if type(value) in (list, tuple):
        return type(value)(_on_meta(item, copies) for item in value)
    if type(value) is dict:
        return {key: _on_meta(item, copies) for key, item in value.items()}
    return value
