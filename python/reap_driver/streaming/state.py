"""What one decoder layer leaves for the next: its output, and what it wrote into shared containers.

A state is tensors and a JSON-serialisable skeleton of how they hang together, so that it can lie on
a device, in host memory or in a file, and comes back with the same values and strides.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from reap_kernels.errors import UnsupportedModel

_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class State:
    """A batch between two decoder layers.

    Attributes:
        layer: index of the layer that ran last.
        skeleton: its output, and changes to containers, with tensors replaced by their numbers.
        tensors: those tensors.
    """

    layer: int
    skeleton: Any
    tensors: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, layer: int, output: Any, changes: Mapping[str, Any]) -> "State":
        """Takes apart what a layer returned and changed.

        Raises:
            UnsupportedModel: it holds something that is no tensor, number, list, tuple or dict.
        """
        tensors: list[Tensor] = []
        skeleton = {"output": _encode(output, tensors), "changes": _encode(dict(changes), tensors)}
        return cls(layer, skeleton, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def output(self) -> Any:
        """What the layer returned."""
        return _decode(self.skeleton["output"], self.tensors)

    def changes(self) -> dict[str, Any]:
        """What it changed, by the path of each container among its arguments."""
        found: dict[str, Any] = _decode(self.skeleton["changes"], self.tensors)
        return found

    def moved(self, move: Callable[[Tensor], Tensor]) -> "State":
        """The same state with every tensor moved elsewhere."""
        return replace(self, tensors=[move(tensor) for tensor in self.tensors])


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, _PLAIN):
        return {"plain": value}
    if type(value) in (list, tuple):
        kind = "list" if type(value) is list else "tuple"
        return {kind: [_encode(item, tensors) for item in value]}
    if type(value) is dict and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    raise UnsupportedModel(
        f"a decoder layer hands on a {type(value).__name__}, which streaming cannot keep between "
        "layers; observe the model with --stream never"
    )


def _decode(skeleton: Any, tensors: list[Tensor]) -> Any:
    [(kind, value)] = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "plain":
        return value
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in value}
    items = [_decode(item, tensors) for item in value]
    return items if kind == "list" else tuple(items)


def leaves(value: Any) -> Iterator[Any]:
    """Everything inside containers, at any depth."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def containers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every container that a layer could change, with its path."""
    if isinstance(value, MutableMapping | MutableSequence):
        yield path, value
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from containers(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from containers(item, f"{path}/{position}")


def unknown_like(value: Any) -> Any:
    """The value with every tensor replaced by one of its shape whose numbers nobody knows."""
    if isinstance(value, Tensor):
        return Unknown.like(value)
    if type(value) in (list, tuple):
        return type(value)(unknown_like(item) for item in value)
    if type(value) is dict:
        return {key: unknown_like(item) for key, item in value.items()}
    return value


class Unknown(Tensor):
    """A tensor without numbers: whatever is computed from it is one too.

    Stands for the outputs of layers that are skipped, so that a model that uses them anywhere but
    in the layer right behind is noticed, not computed wrongly.
    """

    @staticmethod
    def like(tensor: Tensor) -> "Unknown":
        """One of a tensor's shape, strides and dtype."""
        with torch._C.DisableTorchFunctionSubclass():
            meta = tensor.detach().to("meta")
            return Tensor._make_subclass(Unknown, meta)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device
                return func(*args, **(kwargs or {}))
            known = {key: _on_meta(item) for key, item in (kwargs or {}).items()}
            if "device" in known:
                known["device"] = "meta"
            return unknown_like(func(*_on_meta(args), **known))


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("meta").as_subclass(Tensor)
    if isinstance(value, torch.device):
        return torch.device("meta")
    if type(value) in (list, tuple):
        return type(value)(_on_meta(item) for item in value)
    return value
