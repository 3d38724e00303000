"""transformers' experts interface: our one function, registered once, switched on module by module.

An experts module decorated with `use_experts_implementation` looks up, at every call, the function
that its config names. Setting that name is the whole binding: `module.forward` stays untouched, so
hooks that load weights around it (accelerate) keep working.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# (hidden [T, H], top-k ids [T, k], top-k weights [T, k]) -> routed output [T, H]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

IMPLEMENTATION = "reap_kernels"
_ATTRIBUTE = "_experts_implementation_internal"
_handlers: dict[nn.Module, Forward] = {}


def is_interface(module: nn.Module) -> bool:
    """Whether a module's forward is dispatched by transformers' experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_bias")


def eager_forward(module: nn.Module) -> Forward:
    """The module's own forward, as its class wrote it, below the interface's wrappers."""
    forward = inspect.unwrap(type(module).forward)
    return lambda hidden, ids, weights: forward(module, hidden, ids, weights)


@contextlib.contextmanager
def experts_bound(module: nn.Module, handler: Forward) -> Iterator[None]:
    """Calls of an interface module run `handler` inside the context; restored on exit.

    Modules usually share one config object; each entry restores what it found, so entries nest.
    """
    config = module.config
    missing = object()
    before = vars(config).get(_ATTRIBUTE, missing)
    _handlers[module] = handler
    try:
        setattr(config, _ATTRIBUTE, IMPLEMENTATION)
        yield
    finally:
        del _handlers[module]
        if before is missing:
            delattr(config, _ATTRIBUTE)
        else:
            setattr(config, _ATTRIBUTE, before)


@torch.compiler.disable
def _dispatch(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What transformers calls. A module nobody bound shares its config with one that is."""
    handler = _handlers.get(module)
    return (eager_forward(module) if handler is None else handler)(hidden, ids, weights)


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = _dispatch
