"""Runs one decoder layer of a model on one batch, through the model's own forward.

Every layer starts a new forward, in which the model's own code computes embeddings, masks and
positions again; they are cheap. The layers before the requested one are skipped: the last of them
returns its stored output, the others return placeholders. After the requested layer the forward is
aborted. So this module reimplements no model code, only the state between two layers is stored,
and a model that passes on anything else is detected and refused.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reap_driver.observation.batch_state import BatchState
from reap_driver.observation.placeholder import Placeholder, leaves, placeholder_like
from reap_kernels.errors import UnsupportedModel

_REMEDY = "observe the model with `stream='never'`"

# Allowed types of a layer's arguments besides containers: a layer cannot store anything in these
# for later layers, except in a tensor, which is checked.
_HARMLESS = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)

# Key in a state's changes: the first layer changed its input in place.
_INPUT = "input"


class _StopForward(BaseException):
    """Aborts a forward after the requested layer. Not an Exception, so that no model catches it."""


class LayerRunner:
    """Runs decoder layers one at a time."""

    def __init__(self, layers: list[tuple[str, nn.Module]]) -> None:
        self._layers = layers
        self._wanted = 0
        self._state: BatchState | None = None
        self._result: BatchState | None = None
        self._seen: set[int] = set()
        self._originals: dict[int, _Original] = {}

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """Replaces the layers' forwards inside the context, where only `run` may call the model."""
        before = [vars(module).get("forward") for _, module in self._layers]
        for index, (_, module) in enumerate(self._layers):
            module.forward = self._forward_of(index, module.forward)
        try:
            yield
        finally:
            for (_, module), own in zip(self._layers, before, strict=True):
                del module.forward
                if own is not None:  # of another library, such as accelerate
                    module.forward = own

    def run(
        self, layer: int, forward: Callable[[], Any], state: BatchState | None
    ) -> BatchState | None:
        """Runs one layer.

        Args:
            layer: index of the layer; its weights are loaded.
            forward: runs the model on the batch.
            state: state of the batch after the layer before; None before the first.

        Returns:
            The new state; None if the model reached a later layer, or its end, without this one.

        Raises:
            UnsupportedModel: the model passes on more between layers than a state can store.
        """
        self._wanted, self._state, self._result = layer, state, None
        self._seen, self._originals = set(), {}
        tensors = [] if state is None else state.tensors
        versions = [tensor._version for tensor in tensors]
        try:
            with contextlib.suppress(_StopForward):
                forward()
            result = self._result
        finally:
            self._state, self._result, self._originals = None, None, {}
        changed = [tensor._version for tensor in tensors] != versions
        if result is None and changed and layer < len(self._layers):
            raise UnsupportedModel(  # because the unchanged state is needed again
                "the model changes the output of a layer in place and skips "
                f"{self._layers[layer][0]}; {_REMEDY}"
            )
        return result

    def _forward_of(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        """The function that replaces a layer's forward."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            name = self._layers[index][0]
            if index in self._seen:
                raise UnsupportedModel(f"{name} runs twice in one forward; {_REMEDY}")
            if index < max(self._seen, default=-1):
                raise UnsupportedModel(
                    f"{name} runs after layers that follow it in the model; {_REMEDY}"
                )
            self._seen.add(index)
            given = _named(args, kwargs)
            self._remember(index, given)
            last = -1 if self._state is None else self._state.layer
            if index == self._wanted:
                self._result = self._run_layer(index, own, args, kwargs)
                raise _StopForward
            if index > self._wanted:  # the model skips the requested layer on this batch
                raise _StopForward
            if index > last:
                raise UnsupportedModel(
                    f"{name} was skipped on a batch, and later called on it; {_REMEDY}"
                )
            assert self._state is not None
            changes = self._state.changes()
            if len(self._seen) == 1 and changes.get(_INPUT):
                _forget(_input(given))
            output = self._state.output()
            if index < last:
                return placeholder_like(output)
            self._restore(changes)
            return output

        return forward

    def _run_layer(self, index: int, own: Callable[..., Any], args: Any, kwargs: Any) -> BatchState:
        """Runs the requested layer and checks what it was given and what it changed."""
        name = self._layers[index][0]
        given = _named(args, kwargs)
        kept = {id(t) for t in (self._state.tensors if self._state is not None else ())}
        versions = []
        for leaf in leaves(given):
            if isinstance(leaf, Tensor) and (isinstance(leaf, Placeholder) or leaf.is_meta):
                raise UnsupportedModel(
                    f"{name} is given an output of a layer other than the previous one; {_REMEDY}"
                )
            if not isinstance(leaf, _HARMLESS):
                raise UnsupportedModel(
                    f"{name} is given a {type(leaf).__name__}, in which layers may store something "
                    f"for later ones; {_REMEDY}"
                )
            if isinstance(leaf, Tensor) and id(leaf) not in kept:
                versions.append((leaf, leaf._version))
        output = own(*args, **kwargs)
        changes = self._changes()
        changed = {id(t) for t, version in versions if t._version != version}
        # If the first layer changed its input in place, later layers get a placeholder for it. The
        # input of any other layer is the output of the layer before, which is part of the state.
        first = None if self._state is not None else id(_input(given))
        if changed - {first}:
            raise UnsupportedModel(f"{name} changes a tensor that other layers use too; {_REMEDY}")
        if changed or (self._state is not None and self._state.changes().get(_INPUT)):
            changes[_INPUT] = True
        return BatchState.of(index, output, changes, name)

    def _remember(self, index: int, given: dict[str, Any]) -> None:
        """Records the content of containers before any layer changes them, by path."""
        for name, value in given.items():
            for path, container in containers(value, f"{index}/{name}"):
                if id(container) not in self._originals:
                    mapping = isinstance(container, MutableMapping)
                    content = dict(container) if mapping else list(container)
                    self._originals[id(container)] = _Original(path, container, content)

    def _changes(self) -> dict[str, Any]:
        """What this layer and those before have added to containers and removed from them."""
        found: dict[str, Any] = {}
        for path, container, old in self._originals.values():
            if isinstance(container, MutableMapping):
                new = {k: v for k, v in container.items() if k not in old or old[k] is not v}
                new = {k: v for k, v in new.items() if _has_values(v)}
                gone = [k for k in old if k not in container]
                if new or gone:
                    found[path] = [new, gone]
            elif [*map(id, old)] != [*map(id, container)] and _has_values(container):
                found[path] = list(container)
        return found

    def _restore(self, changes: dict[str, Any]) -> None:
        """Gives containers the content that they had after the layer that ran last."""
        for path, container, _ in self._originals.values():
            if path not in changes:
                continue
            if isinstance(container, MutableMapping):
                new, gone = changes[path]
                container.update(new)
                for key in gone:
                    container.pop(key, None)
            else:
                container[:] = changes[path]


class _Original(NamedTuple):
    """A container and its content when a layer first received it."""

    path: str
    container: Any
    content: Any


def _has_values(value: Any) -> bool:
    """Whether no part of it is a placeholder.

    A placeholder was put there by the model itself, between layers, and will be in every forward.
    """
    return not any(isinstance(leaf, Placeholder) for leaf in leaves(value))


def _input(given: dict[str, Any]) -> Any:
    """The first argument of a layer."""
    return next(iter(given.values()), None)


def _forget(tensor: Any) -> None:
    """Turns a tensor into a placeholder, for everything that still refers to it."""
    if isinstance(tensor, Tensor):
        tensor.__class__ = Placeholder


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name or position."""
    return {**{str(place): arg for place, arg in enumerate(args)}, **kwargs}


def containers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every container that a layer can change, with its path."""
    if isinstance(value, MutableMapping | MutableSequence):
        yield path, value
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from containers(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from containers(item, f"{path}/{position}")
