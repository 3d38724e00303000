"""Runs a model's own code on made inputs, on the CPU, whatever the defaults of the process are."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Made:
    """Makes the same random tensors every time."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 [*shape], on the CPU."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float32, device="cpu")


class Stub(nn.Module):
    """Stands for a child of a module."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the answer is to the arguments, those given by name last."""
        return self._answer(*args, *kwargs.values())


def with_stubs(module: nn.Module, answer: Callable[[str, nn.Module], Callable[..., Any]]) -> Any:
    """A copy of a module that shares everything with it but its children.

    Args:
        module: it; nothing of it changes.
        answer: makes what a child's stub does from its name and the child.
    """
    made = copy.copy(module)
    made.__dict__["_modules"] = {
        name: child if child is None else Stub(answer(name, child))
        for name, child in module._modules.items()
    }
    return made


def run_forward(module: nn.Module, first: Tensor, **given: Any) -> Any:
    """Calls the forward of a module's class.

    Args:
        module: it, or a copy of it.
        first: its first argument.
        given: others, where it takes them; arguments that it needs besides are None.
    """
    forward = inspect.unwrap(type(module).forward)
    named = list(inspect.signature(forward).parameters.values())[2:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [p for p in named if p.kind in kinds and (p.name in given or p.default is p.empty)]
    with torch.no_grad():
        return forward(module, first, **{p.name: given.get(p.name) for p in known})


def line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
