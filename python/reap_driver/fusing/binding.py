"""Puts other functions in the place of a module's forward or of a name of a Python module."""

import contextlib
import copyreg
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

# (the module, its own forward, positional arguments, keyword arguments) -> what forward returns
Replacement = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_MARK = "_reap_fused"


def unfit(module: nn.Module) -> str:
    """Why the forward of a module cannot be replaced; empty if it can."""
    if hasattr(type(module), _MARK):
        return "is bound by another context that is still open"
    if "forward" in vars(module):
        return "another library (accelerate, a quantizer) has replaced its forward"
    if module._compiled_call_impl is not None:
        return "is compiled by itself (module.compile())"
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "has hooks, which would see other values or none" if any(hooks) else ""


@contextlib.contextmanager
def forward_replaced(module: nn.Module, replacement: Replacement) -> Iterator[None]:
    """Inside, calls of the module run `replacement`.

    The module has another class inside, derived from its own, so copies of it that
    `DataParallel` makes run the replacement with their own weights, and `torch.compile` sees that
    it has changed. Copies by `copy` and `pickle` have the module's own class.
    """
    own: Any = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, lambda *a, **k: own.forward(self, *a, **k), args, kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        make, given, *rest = own.__reduce_ex__(self, protocol)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, given = copyreg._reconstructor, (*given, object, None)  # type: ignore[attr-defined]
        return (make, tuple(own if one is bound else one for one in given), *rest)

    names = {
        "forward": forward,
        _MARK: True,
        "__reduce_ex__": reduced,
        "__module__": own.__module__,
        "__doc__": own.__doc__,
    }
    bound: Any = type(own.__name__, (own,), names)
    module.__class__ = bound
    try:
        yield
    finally:
        if type(module) is bound:
            module.__class__ = own


class GlobalFunctions:
    """Functions in the place of names of Python modules, as long as one context uses them.

    Modules of one architecture share them, so contexts of several models may be open, and end in
    any order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[tuple[int, str], int] = {}
        self._found: dict[tuple[int, str], Any] = {}

    @contextlib.contextmanager
    def replaced(self, names: dict[str, Any], name: str, value: Any) -> Iterator[Any]:
        """Inside, a name has another value; yields it, or that of the context that came first.

        Args:
            names: of the Python module.
            name: in it.
            value: its value inside.
        """
        key = (id(names), name)
        with self._lock:
            if key not in self._users:
                self._found[key], self._users[key] = (names[name], value), 0
                names[name] = value
            self._users[key] += 1
            made = self._found[key][1]
        try:
            yield made
        finally:
            with self._lock:
                self._users[key] -= 1
                if not self._users[key]:
                    own, made = self._found.pop(key)
                    del self._users[key]
                    if names.get(name) is made:
                        names[name] = own
