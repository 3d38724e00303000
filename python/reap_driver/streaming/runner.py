"""Runs one decoder layer of a model for one batch, through the model's own forward.

The forward starts anew for every layer: embeddings, masks and positions are cheap and are made
again by the model's own code. Layers before the one wanted are not computed: the last of them
returns what it returned before, those before it return tensors without numbers; behind the one
wanted the forward is left. So no model code is written here, nothing is kept but what one layer
hands to the next, and a model that hands on anything else is noticed and refused.
"""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from reap_driver.streaming.state import State, Unknown, containers, leaves, unknown_like
from reap_kernels.errors import UnsupportedModel

_REMEDY = "observe the model with --stream never"

# What a layer may be given: numbers and names cannot carry anything from one layer to the next.
_HARMLESS = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


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
        self._before: dict[int, tuple[Any, Any]] = {}

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """Inside, forwards of the model are to be started by `run` alone."""
        for index, (_, module) in enumerate(self._layers):
            module.forward = self._forward_of(index, module.forward)
        try:
            yield
        finally:
            for _, module in self._layers:
                del module.forward

    def run(self, layer: int, forward: Callable[[], Any], state: State | None) -> State | None:
        """Runs one layer.

        Args:
            layer: its index; its weights are there.
            forward: runs the model on the batch.
            state: of the batch, from the layer that ran before; None before the first.

        Returns:
            The new state; None if the model came to its end without calling the layer.

        Raises:
            UnsupportedModel: the model hands on more between layers than can be kept.
        """
        self._wanted, self._state, self._result = layer, state, None
        self._seen, self._before = set(), {}
        try:
            forward()
        except _Left:
            return self._result
        finally:
            self._state, self._result, self._before = None, None, {}
        return None

    def _forward_of(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for a layer's forward."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            name = self._layers[index][0]
            if index in self._seen:
                raise UnsupportedModel(f"{name} runs twice in one forward; {_REMEDY}")
            self._seen.add(index)
            given = _named(args, kwargs)
            self._remember(given)
            last = -1 if self._state is None else self._state.layer
            if index == self._wanted:
                self._result = self._ran(index, own, args, kwargs)
                raise _Left
            if index > last:
                raise UnsupportedModel(
                    f"{name} runs before layers that come before it in the model; {_REMEDY}"
                )
            assert self._state is not None
            output = self._state.output()
            if index < last:
                return unknown_like(output)
            self._restore(given)
            return output

        return forward

    def _ran(self, index: int, own: Callable[..., Any], args: Any, kwargs: Any) -> State:
        """Runs the layer itself."""
        name = self._layers[index][0]
        given = _named(args, kwargs)
        kept = {id(t) for t in (self._state.tensors if self._state is not None else ())}
        versions = []
        for leaf in leaves(given):
            if isinstance(leaf, Unknown):
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
        state = State.of(index, output, self._changes(given))
        # The first layer has no state: its first argument is its input, and may be written to.
        if self._state is not None and any(t._version != version for t, version in versions):
            raise UnsupportedModel(f"{name} changes a tensor that it shares with others; {_REMEDY}")
        return state

    def _remember(self, given: dict[str, Any]) -> None:
        """What containers hold before any layer has changed them."""
        for _, container in _containers(given):
            content = dict(container) if isinstance(container, MutableMapping) else list(container)
            self._before.setdefault(id(container), (container, content))

    def _changes(self, given: dict[str, Any]) -> dict[str, Any]:
        """What layers have put into containers, this one and those before."""
        found: dict[str, Any] = {}
        for path, container in _containers(given):
            before = self._before[id(container)][1] if id(container) in self._before else None
            if isinstance(container, MutableMapping):
                old = before or {}
                new = {k: v for k, v in container.items() if k not in old or old[k] is not v}
                if new:
                    found[path] = new
            elif before is None or [*map(id, before)] != [*map(id, container)]:
                found[path] = list(container)
        return found

    def _restore(self, given: dict[str, Any]) -> None:
        """Puts into containers what they held behind the layer that ran last."""
        assert self._state is not None
        changes = self._state.changes()
        for path, container in _containers(given):
            if path in changes:
                if isinstance(container, MutableMapping):
                    container.update(changes[path])
                else:
                    container[:] = changes[path]


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name or position."""
    return {**{str(place): arg for place, arg in enumerate(args)}, **kwargs}


def _containers(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        yield from containers(value, name)
