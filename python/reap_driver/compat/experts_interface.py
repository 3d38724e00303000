"""Registers a function with transformers' experts interface, and enables it per experts module.

An experts module decorated with `use_experts_implementation` looks up the function that its
configuration names at every call. To observe a module, only that name is set: `module.forward` is
unchanged, so hooks that load weights around it (accelerate) keep working.
"""

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# (hidden [T, H], top-k ids [T, k], top-k weights [T, k]) -> routed output [T, H]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

IMPLEMENTATION = "reap_kernels"
_GROUPED = "grouped_mm"  # of transformers: both products of all experts in one call each
_ATTRIBUTE = "_experts_implementation_internal"
_handlers: dict[nn.Module, Forward] = {}


def is_interface(module: nn.Module) -> bool:
    """Whether transformers' experts interface dispatches the module's forward."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_bias")


def eager_forward(module: nn.Module) -> Forward:
    """The forward that the module's class defines, without the interface's wrapper."""
    forward = inspect.unwrap(type(module).forward)
    return lambda hidden, ids, weights: forward(module, hidden, ids, weights)


class GroupedForm(NamedTuple):
    """Transformers' grouped form of a module's forward, which runs no loop over experts.

    Attributes:
        kind: see `kind_of`.
        forward: see `Forward`.
    """

    kind: Hashable
    forward: Forward


def grouped_form(module: nn.Module) -> GroupedForm | None:
    """The grouped form of an experts module on the interface, with its weights where they are now;
    None where torch's grouped product does not take them.
    """
    function = ALL_EXPERTS_FUNCTIONS.get(_GROUPED)
    weights = dict(module.named_parameters())
    if function is None or not all(map(_takes_grouped, weights.values())):
        return None
    experts = len(weights["down_proj"])
    device = weights["down_proj"].device
    if getattr(module, "num_experts", None) != experts or torch.is_autocast_enabled(device.type):
        return None  # ids of other experts; grouped products do not follow autocast

    def run(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        known = (ids >= 0) & (ids < experts)  # a slot of any other expert adds nothing
        out: Tensor = function(
            module, hidden, torch.where(known, ids, 0), torch.where(known, weights, 0)
        )
        return out

    return GroupedForm(kind_of(module), run)


def _takes_grouped(weight: Tensor) -> bool:
    """Whether torch's grouped product takes a weight: matrices of rows that are aligned."""
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    rows = [size * weight.element_size() % 16 for size in weight.shape[1:]]
    return weight.is_contiguous() and weight.data_ptr() % 16 == 0 and not any(rows)


# Set by torch.nn.Module, and by accelerate around a forward; the class's own forward reads none.
_NOT_READ = {*vars(nn.Module()), "_hf_hook", "_old_forward", "forward"}


def kind_of(module: nn.Module) -> Hashable:
    """What a module's forward depends on beside the values of its weights: equal for modules that
    compute alike. An attribute of an unknown type is like no other but itself, and a module with
    buffers, which offloading may replace, like no other module.
    """
    parts: list[Hashable] = [id(module)] if any(True for _ in module.buffers()) else []
    for name, part in module.named_modules():
        own = ((key, value) for key, value in vars(part).items() if key not in _NOT_READ)
        parts.append((name, type(part), *((key, _plain(value)) for key, value in own)))
    tensors = (
        (name, tensor.shape, tensor.dtype, tensor.device)
        for name, tensor in module.named_parameters()
    )
    return (*parts, *tensors)


def _plain(value: Any) -> Hashable:
    known = isinstance(value, bool | int | float | str | None | torch.dtype)
    return (type(value), value) if known else id(value)


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
