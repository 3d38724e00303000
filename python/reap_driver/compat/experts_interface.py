"""Registers a function with transformers' experts interface, and enables it per experts module.

An experts module decorated with `use_experts_implementation` looks up the function that its
configuration names at every call. To observe a module, only that name is set: `module.forward` is
unchanged, so hooks that load weights around it (accelerate) keep working.
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
    """Whether transformers' experts interface dispatches the module's forward."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_bias")


def eager_forward(module: nn.Module) -> Forward:
    """The forward that the module's class defines, without the interface's wrapper."""
    forward = inspect.unwrap(type(module).forward)
    return lambda hidden, ids, weights: forward(module, hidden, ids, weights)


@contextlib.contextmanager
def experts_bound(module: nn.Module, handler: Forward) -> Iterator[None]:
    """Inside, calls of an experts module run `handler`.

    Modules usually share one configuration object. Each context restores the value that it found,
    so contexts may be nested.
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
    """What transformers calls; also for modules without a handler that share the configuration."""
    handler = _handlers.get(module)
    return (eager_forward(module) if handler is None else handler)(hidden, ids, weights)


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = _dispatch
