"""What a function that rotates queries and keys computes, found from its values on made inputs.

A candidate takes arguments named `cos` and `sin` after one or two tensors; what it is called is not
looked at. It fits where its values are those of `reap_kernels.rotary` with one of the layouts that
models use.
"""

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reap_driver.fusing.norms import same
from reap_driver.fusing.probing import Made

Rotation = Callable[..., Any]

_BATCH, _HEADS, _TOKENS, _WIDTH = 2, (3, 2), 5, 16
# Columns of cos and sin for each relation to the width of a head, as the probe has them.
_COLUMNS = {"all": 16, "half": 8, "fewer": 4}


def relation(columns: int, width: int) -> str:
    """How many columns cos and sin have: all of the head's, half of them, or another number."""
    return "all" if columns == width else "half" if 2 * columns == width else "fewer"


@dataclass(frozen=True)
class Form:
    """How a function takes its arguments.

    Attributes:
        tensors: 1 or 2, before cos and sin.
        signature: of the function.
        first: further arguments with which heads come before tokens.
    """

    tensors: int
    signature: inspect.Signature
    first: Mapping[str, int]

    @classmethod
    def of(cls, function: Any) -> "Form | None":
        """That of a candidate; None of any other object."""
        if not callable(function) or inspect.isclass(function):
            return None
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return None
        names = list(signature.parameters)
        if not {"cos", "sin"} < set(names) or names.index("sin") != names.index("cos") + 1:
            return None
        if names.index("cos") not in (1, 2):
            return None
        first = {"unsqueeze_dim": 1} if "unsqueeze_dim" in names else {}
        return cls(names.index("cos"), signature, first)

    def takes(self, given: Mapping[str, Any]) -> bool:
        """Whether arguments by name are those that the probe had: others have their defaults."""
        parameters = self.signature.parameters
        known = {*list(parameters)[: self.tensors], "cos", "sin", "unsqueeze_dim"}
        others = given.keys() - known
        return all(given[name] is parameters[name].default for name in others)


@dataclass(frozen=True)
class Layout:
    """Which columns are rotated by which angle, as `reap_kernels.rotary` takes it.

    Attributes:
        interleaved, separate, per_pair, float32: see there.
        first_half: cos and sin have every angle twice; only their first halves are given on.
        at_end: the last columns are rotated.
    """

    interleaved: bool = False
    separate: bool = False
    per_pair: bool = False
    float32: bool = False
    first_half: bool = False
    at_end: bool = False

    def arguments(self, cos: Tensor, sin: Tensor, width: int) -> dict[str, Any]:
        """Keyword arguments of `rotary` for heads of `width` columns, cos and sin included."""
        if self.first_half:
            cos, sin = (angles[..., : angles.shape[-1] // 2] for angles in (cos, sin))
        rotated = cos.shape[-1] * (2 if self.per_pair else 1)
        return {
            "cos": cos,
            "sin": sin,
            "interleaved": self.interleaved,
            "separate": self.separate,
            "per_pair": self.per_pair,
            "float32": self.float32,
            "start": width - rotated if self.at_end else 0,
        }


def layouts(columns: str) -> list[Layout]:
    """Those that are tried, the most frequent first."""
    found = []
    kinds: tuple[dict[str, bool], ...] = (
        {},
        {"per_pair": True, "first_half": True},
        {"per_pair": True},
    )
    pairs: tuple[dict[str, bool], ...] = (
        {},
        {"interleaved": True},
        {"interleaved": True, "separate": True},
    )
    for at_end, float32, one, two in itertools.product((False, True), (False, True), kinds, pairs):
        fits = "first_half" in one or "per_pair" not in one or columns != "all"
        if fits and (columns != "all" or not at_end):
            found.append(Layout(**one, **two, float32=float32, at_end=at_end))
    return found


def layout_of(
    function: Rotation,
    form: Form,
    columns: str,
    dtype: torch.dtype,
    angles: torch.dtype,
    rotate: Callable[..., tuple[Any, Any]],
) -> Layout | None:
    """The layout whose values are those of a function; None if it has another.

    Args:
        function: the candidate.
        form: how it takes its arguments.
        columns: of cos and sin, see `relation`.
        dtype: of queries and keys.
        angles: dtype of cos and sin.
        rotate: `reap_kernels.rotary`.
    """
    made = Made()
    shapes = [(_BATCH, heads, _TOKENS, _WIDTH) for heads in _HEADS[: form.tensors]]
    given = [made.normal(*shape).to(dtype) for shape in shapes]
    shape = (_BATCH, _TOKENS, _COLUMNS[columns])
    cos, sin = (made.normal(*shape).to(angles) for _ in range(2))
    try:
        with torch.no_grad():
            own = function(*given, cos, sin, **form.first)
    except Exception:  # noqa: BLE001 - whatever a model's code does with shapes that it does not take
        return None
    if isinstance(own, tuple) != (len(given) == 2):
        return None  # it returns as many tensors as it turns, one of them alone
    own = own if isinstance(own, tuple) else (own,)
    if len(own) != len(given):
        return None
    heads = given if len(given) == 2 else [*given, None]
    for layout in layouts(columns):
        if layout.float32 or angles == dtype:
            # On the CPU, whatever backend the process asks for elsewhere.
            ours = rotate(*heads, **layout.arguments(cos, sin, _WIDTH), backend="cpu")
            if all(same(one, two) for one, two in zip(own, ours, strict=False)):
                return layout
    return None
