"""The state of a batch between two decoder layers: the output of the first, and its side effects.

A state consists of tensors and a JSON-serializable skeleton of the structure they are in, so it can
be stored on a device, in host memory or in a file, and is restored with the same values and
strides. Side effects are changes of containers that are passed to several layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from reap_kernels.errors import UnsupportedModel
from reap_kernels.schema import short

_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class BatchState:
    """The state of a batch between two decoder layers.

    Attributes:
        layer: index of the layer that ran last.
        skeleton: its output and the changed containers, with each tensor replaced by its index.
        tensors: the tensors.
    """

    layer: int
    skeleton: Any
    tensors: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls, layer: int, output: Any, changes: Mapping[str, Any], name: str = "a decoder layer"
    ) -> "BatchState":
        """The state after a layer. A tensor that occurs twice is stored once.

        Args:
            layer: index of the layer.
            output: what the layer returned.
            changes: {path: change} of every container that layers have changed so far.
            name: name of the layer, for the error.

        Raises:
            UnsupportedModel: a value is not a tensor, number, text, None, list, tuple or dict.
        """
        tensors: dict[int, Tensor] = {}
        try:
            parts = {"output": output, "changes": dict(changes)}
            skeleton = {key: _encode(part, tensors) for key, part in parts.items()}
        except _Unkept as error:
            raise UnsupportedModel(
                f"{name} passes on a {error}, which streaming cannot store between layers; observe "
                "the model with `stream='never'`"
            ) from error
        return cls(layer, skeleton, [tensor.detach() for tensor in tensors.values()])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def output(self) -> Any:
        """What the layer returned."""
        return _decode(self.skeleton["output"], self.tensors)

    def changes(self) -> dict[str, Any]:
        """The changes of containers, by the path of each container in the layers' arguments."""
        found: dict[str, Any] = _decode(self.skeleton["changes"], self.tensors)
        return found

    def moved(self, move: Callable[[Tensor], Tensor]) -> "BatchState":
        """The same state with `move` applied to every tensor."""
        return replace(self, tensors=[move(tensor) for tensor in self.tensors])


class _Unkept(Exception):
    """A value that a state cannot hold; the message is the name of its type."""


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
    """Checks a skeleton that was read from a file.

    Raises:
        ValueError: `BatchState.of` makes no such skeleton of this number of tensors.
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
            raise ValueError(f"has the part {short(part)}, which no state has")


def _is_pair(value: Any) -> bool:
    """Whether this is a list of a key and a value."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)
