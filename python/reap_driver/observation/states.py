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
from reap_kernels.schema import short

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
    def of(
        cls, layer: int, output: Any, changes: Mapping[str, Any], name: str = "a decoder layer"
    ) -> "State":
        """Takes apart what a layer returned and changed; a tensor that is there twice stays one.

        Raises:
            UnsupportedModel: it holds something that is no tensor, number, list, tuple or dict;
                says that `name` hands it on.
        """
        tensors: dict[int, Tensor] = {}
        try:
            parts = {"output": output, "changes": dict(changes)}
            skeleton = {key: _encode(part, tensors) for key, part in parts.items()}
        except _Unkept as error:
            raise UnsupportedModel(
                f"{name} hands on a {error}, which streaming cannot keep between layers; observe "
                "the model with --stream never"
            ) from error
        return cls(layer, skeleton, [tensor.detach() for tensor in tensors.values()])

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


class _Unkept(Exception):
    """Something that is no part of a state; its text is the name of its type."""


def _encode(value: Any, tensors: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.setdefault(id(value), value)
        return {"tensor": list(tensors).index(id(value))}
    if isinstance(value, _PLAIN):
        return {"plain": value}
    if type(value) in (list, tuple):
        kind = "list" if type(value) is list else "tuple"
        return {kind: [_encode(item, tensors) for item in value]}
    if type(value) is dict and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    raise _Unkept(type(value).__name__)


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


def check_skeleton(skeleton: Any, tensors: int) -> None:
    """Checks that a skeleton is one that `State.of` makes of so many tensors.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(skeleton, dict) or set(skeleton) != {"output", "changes"}:
        raise ValueError(f"has the skeleton {short(skeleton)}; expected output and changes")
    changes, below = skeleton["changes"], list(skeleton.values())
    if not isinstance(changes, dict) or list(changes) != ["dict"]:
        raise ValueError(f"has the changes {short(changes)}; expected a dict")
    while below:
        part = below.pop()
        [(kind, value)] = part.items() if isinstance(part, dict) and len(part) == 1 else [("", 0)]
        if kind in ("list", "tuple") and isinstance(value, list):
            below += value
        elif kind == "dict" and isinstance(value, list) and all(map(_is_pair, value)):
            below += [item for _, item in value]
        elif not (
            (kind == "tensor" and type(value) is int and 0 <= value < tensors)
            or (kind == "plain" and isinstance(value, _PLAIN))
        ):
            raise ValueError(f"has the part {short(part)}, which is none of a state")


def _is_pair(value: Any) -> bool:
    """Whether this is a key and its value."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)


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


def unknown_like(value: Any, device: torch.device | None = None) -> Any:
    """The value with every tensor replaced by one of its shape whose numbers nobody knows.

    Args:
        value: with tensors, alone or in lists, tuples and dicts.
        device: where they say they are; None: where they are.
    """
    if isinstance(value, Tensor):
        return Unknown.like(value, device)
    if type(value) in (list, tuple) or hasattr(type(value), "n_sequence_fields"):  # torch.max's
        return type(value)([unknown_like(item, device) for item in value])
    if type(value) is dict:
        return {key: unknown_like(item, device) for key, item in value.items()}
    return value


class Unknown(Tensor):
    """A tensor without numbers: whatever is computed from it is one too.

    Stands for the outputs of layers that are skipped, so that a model that uses them anywhere but
    in the layer right behind is noticed, not computed wrongly.
    """

    _says: torch.device | None = None

    @staticmethod
    def like(tensor: Tensor, device: torch.device | None = None) -> "Unknown":
        """One of a tensor's shape, strides and dtype, that says it is on its or that device."""
        with torch._C.DisableTorchFunctionSubclass():
            unknown = Tensor._make_subclass(Unknown, tensor.detach().to("meta"))
            unknown._says = tensor.device if device is None else device
            return unknown

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", str(func))
            if name == "__get__":  # shape and dtype, but also .mT and .data
                says = getattr(args[0], "_says", None)
                if says is not None and getattr(func, "__self__", None) is Tensor.device:
                    return says
                return unknown_like(func(*args, **(kwargs or {})), says)
            if name in ("__getitem__", "__setitem__"):
                args = (args[0], _positions(args[1]), *args[2:])
            given = [leaf for leaf in leaves([args, kwargs or {}]) if isinstance(leaf, Tensor)]
            says = next((leaf._says for leaf in given if isinstance(leaf, Unknown)), None)
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
            return unknown_like(result, says)


def _positions(index: Any) -> Any:
    """An index with masks that have numbers as the positions they mean: how many these are is the
    shape of what is indexed.
    """
    found: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        mask = isinstance(part, Tensor) and part.dtype is torch.bool
        known = mask and not isinstance(part, Unknown) and not part.is_meta
        found += part.nonzero(as_tuple=True) if known else [part]
    return tuple(found)


def _used(how: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the model uses what came out of a layer in more than the layer behind it ({how}); "
        "observe the model with --stream never"
    )


def _on_meta(value: Any, copies: dict[int, Tensor]) -> Any:
    """The value with tensors that compute nothing; those with numbers are copied, into `copies`."""
    if isinstance(value, Unknown) and value.is_meta:
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
