"""Runs one decoder layer of a model for one batch, through the model's own forward.

The forward starts anew for every layer: embeddings, masks and positions are cheap and are made
again by the model's own code. Layers before the one wanted are not computed: the last of them
returns what it returned before, those before it return tensors without numbers; behind the one
wanted the forward is left. So no model code is written here, nothing is kept but what one layer
hands to the next, and a model that hands on anything else is noticed and refused.
"""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reap_driver.observation.states import State, Unknown, containers, leaves, unknown_like
from reap_kernels.errors import UnsupportedModel

_REMEDY = "observe the model with --stream never"

# What a layer may be given: numbers and names cannot carry anything from one layer to the next.
_HARMLESS = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)

# Among a state's changes: that the first layer changed its own input in place.
_INPUT = "input"


class _Left(BaseException):
    """Leaves a forward behind the layer that was wanted; no error, so nobody should catch it."""


class LayerRunner:
    """Runs decoder layers one at a time."""

    def __init__(self, layers: list[tuple[str, nn.Module]]) -> None:
        self._layers = layers
        self._wanted = 0
        self._state: State | None = None
        self._result: State | None = None
        self._seen: set[int] = set()
        self._before: dict[int, _Before] = {}

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """Inside, forwards of the model are to be started by `run` alone."""
        before = [vars(module).get("forward") for _, module in self._layers]
        for index, (_, module) in enumerate(self._layers):
            module.forward = self._forward_of(index, module.forward)
        try:
            yield
        finally:
            for (_, module), own in zip(self._layers, before, strict=True):
                del module.forward
                if own is not None:  # somebody else's, such as accelerate's
                    module.forward = own

    def run(self, layer: int, forward: Callable[[], Any], state: State | None) -> State | None:
        """Runs one layer.

        Args:
            layer: its index; its weights are there.
            forward: runs the model on the batch.
            state: of the batch, from the layer that ran before; None before the first.

        Returns:
            The new state; None if the model came to later layers, or its end, without this one.

        Raises:
            UnsupportedModel: the model hands on more between layers than can be kept.
        """
        self._wanted, self._state, self._result = layer, state, None
        self._seen, self._before = set(), {}
        tensors = [] if state is None else state.tensors
        versions = [tensor._version for tensor in tensors]
        try:
            with contextlib.suppress(_Left):
                forward()
            result = self._result
        finally:
            self._state, self._result, self._before = None, None, {}
        changed = [tensor._version for tensor in tensors] != versions
        if result is None and changed and layer < len(self._layers):
            raise UnsupportedModel(  # as the state is wanted again, as it was
                "the model changes what a layer returned in place, and leaves out "
                f"{self._layers[layer][0]}; {_REMEDY}"
            )
        return result

    def _forward_of(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for a layer's forward."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            name = self._layers[index][0]
            if index in self._seen:
                raise UnsupportedModel(f"{name} runs twice in one forward; {_REMEDY}")
            if index < max(self._seen, default=-1):
                raise UnsupportedModel(
                    f"{name} runs behind layers that come after it in the model; {_REMEDY}"
                )
            self._seen.add(index)
            given = _named(args, kwargs)
            self._remember(index, given)
            last = -1 if self._state is None else self._state.layer
            if index == self._wanted:
                self._result = self._ran(index, own, args, kwargs)
                raise _Left
            if index > self._wanted:  # this batch is not for the one wanted
                raise _Left
            if index > last:
                raise UnsupportedModel(
                    f"{name} was left out on a batch, and then called on it; {_REMEDY}"
                )
            assert self._state is not None
            changes = self._state.changes()
            if len(self._seen) == 1 and changes.get(_INPUT):
                _forget(_input(given))
            output = self._state.output()
            if index < last:
                return unknown_like(output)
            self._restore(changes)
            return output

        return forward

    def _ran(self, index: int, own: Callable[..., Any], args: Any, kwargs: Any) -> State:
        """Runs the layer itself."""
        name = self._layers[index][0]
        given = _named(args, kwargs)
        kept = {id(t) for t in (self._state.tensors if self._state is not None else ())}
        versions = []
        for leaf in leaves(given):
            if isinstance(leaf, Tensor) and (isinstance(leaf, Unknown) or leaf.is_meta):
                raise UnsupportedModel(
                    f"{name} is given what came out of a layer before the one before it; {_REMEDY}"
                )
            if not isinstance(leaf, _HARMLESS):
                raise UnsupportedModel(
                    f"{name} is given a {type(leaf).__name__}, in which layers may keep something "
                    f"for others; {_REMEDY}"
                )
            if isinstance(leaf, Tensor) and id(leaf) not in kept:
                versions.append((leaf, leaf._version))
        output = own(*args, **kwargs)
        changes = self._changes()
        changed = {id(t) for t, version in versions if t._version != version}
        # Whoever uses the first layer's input behind it gets one without numbers, if it was changed
        # in place; that of other layers is the output of the one before, which is known to them.
        first = None if self._state is not None else id(_input(given))
        if changed - {first}:
            raise UnsupportedModel(f"{name} changes a tensor that it shares with others; {_REMEDY}")
        if changed or (self._state is not None and self._state.changes().get(_INPUT)):
            changes[_INPUT] = True
        return State.of(index, output, changes, name)

    def _remember(self, index: int, given: dict[str, Any]) -> None:
        """What containers hold before any layer has changed them, by where they were first seen."""
        for path, container in _containers(given):
            if id(container) not in self._before:
                mapping = isinstance(container, MutableMapping)
                content = dict(container) if mapping else list(container)
                self._before[id(container)] = _Before(f"{index}/{path}", container, content)

    def _changes(self) -> dict[str, Any]:
        """What layers have put into containers and taken out, this one and those before."""
        found: dict[str, Any] = {}
        for path, container, old in self._before.values():
            if isinstance(container, MutableMapping):
                new = {k: v for k, v in container.items() if k not in old or old[k] is not v}
                new = {k: v for k, v in new.items() if _is_known(v)}
                gone = [k for k in old if k not in container]
                if new or gone:
                    found[path] = [new, gone]
            elif [*map(id, old)] != [*map(id, container)] and _is_known(container):
                found[path] = list(container)
        return found

    def _restore(self, changes: dict[str, Any]) -> None:
        """Puts into containers what they held behind the layer that ran last."""
        for path, container, _ in self._before.values():
            if path not in changes:
                continue
            if isinstance(container, MutableMapping):
                new, gone = changes[path]
                container.update(new)
                for key in gone:
                    container.pop(key, None)
            else:
                container[:] = changes[path]


class _Before(NamedTuple):
    """A container as it was when a layer first was given it."""

    path: str
    container: Any
    content: Any


def _is_known(value: Any) -> bool:
    """Whether nothing in it is without numbers. The model itself put it there if so, between
    layers, and does so again in every forward.
    """
    return not any(isinstance(leaf, Unknown) for leaf in leaves(value))


def _input(given: dict[str, Any]) -> Any:
    """The first of a layer's arguments."""
    return next(iter(given.values()), None)


def _forget(tensor: Any) -> None:
    """Takes a tensor's numbers from everybody who still holds it."""
    if isinstance(tensor, Tensor):
        tensor.__class__ = Unknown


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name or position."""
    return {**{str(place): arg for place, arg in enumerate(args)}, **kwargs}


def _containers(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        yield from containers(value, name)
