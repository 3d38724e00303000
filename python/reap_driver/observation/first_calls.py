"""Compares each layer's first call with the module's own forward, without waiting for the device.

The results of all layers stay on the device until the forward has ended, and are read together. A
module's own forward is a loop over experts, slow on a GPU; modules that differ in nothing but their
weights need it once: the others are compared with transformers' grouped form of it, which computes
the same from the same weights. So every layer is compared, and every kind of module with its own
code.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reap_driver.compat.experts_interface import Forward, GroupedForm, is_interface, kind_of
from reap_driver.model.adapters import ExpertsModule, KernelAdapter, Sample
from reap_driver.model.discover import MoELayer
from reap_kernels import Activation
from reap_kernels.errors import DataError, UnsupportedModel

# Number of tokens that are compared. Few, because most of the cost is reading the weights of every
# expert that these tokens reach.
_SAMPLE = 4

# Largest accepted ||ours - own|| / ||own|| on the sample. Rounding causes at most a tenth of
# each; a missing expert or a wrong activation causes more than 0.1.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}


class Code(NamedTuple):
    """What computed the output that a first call is compared with.

    Attributes:
        kind: of the module, see `GroupedForm`; None where it is like no other.
        own: whether it is the code of the module's class.
    """

    kind: Hashable = None
    own: bool = True


@dataclass(frozen=True)
class _Comparison:
    """One layer's comparison, on its device.

    Attributes:
        layer: it.
        dtype: in which the layer computes.
        code: what computed its module's own output.
        rows: number of output rows that are compared.
        figures: float64 [4]: ||ours - own||, ||own||, rows of `own` with NaN or Inf, and the number
            of tokens that count; without any, the comparison says nothing.
    """

    layer: MoELayer
    dtype: torch.dtype
    code: Code
    rows: int
    figures: Tensor


class FirstCalls:
    """The comparisons of the first calls of one observation's layers, and their activations."""

    def __init__(self) -> None:
        self._passed: set[str] = set()  # names of layers
        self._kinds: set[Hashable] = set()  # of modules whose own code has passed
        self._waiting: dict[str, _Comparison] = {}  # of this forward
        self._activations: dict[Hashable, Activation] = {}

    def activation(self, module: ExpertsModule, adapter: KernelAdapter) -> Activation:
        """A module's activation, which is probed once for modules alike: probing waits for the
        device.
        """
        if not is_interface(module):
            return adapter.activation(module)
        kind = kind_of(module)
        if kind not in self._activations:
            found = adapter.activation(module)
            if found.fn is not None:  # the module's own
                return found
            self._activations[kind] = found
        return self._activations[kind]

    def due(self, name: str) -> bool:
        """Whether a layer, by its name, is still to be compared."""
        return name not in self._passed and name not in self._waiting

    def sample(
        self, name: str, tokens: int, mask: Tensor | None, device: torch.device
    ) -> Sample | None:
        """Tokens to compare in a layer's call, spread over those that count; None unless it is due.

        Args:
            name: of the layer.
            tokens: T of the call.
            mask: bool [T] on `device`; None if all tokens count.
            device: where the layer computes.
        """
        if not self.due(name) or not tokens:
            return None
        places = torch.linspace(
            0, 1, min(_SAMPLE, tokens), dtype=torch.float64, device=device
        )  # made on the device: a copy from the host would wait for it
        if mask is None:
            return Sample((places * (tokens - 1)).long(), None)
        ranks = mask.cumsum(0)  # the first token of rank r is the r-th that counts
        counted = ranks[-1]
        wanted = (places * (counted - 1)).long().clamp(min=0) + 1
        return Sample(torch.searchsorted(ranks, wanted).clamp(max=tokens - 1), counted)

    def reference(
        self, eager: Forward, grouped: Callable[[], GroupedForm | None] | None
    ) -> tuple[Forward, Code]:
        """What computes the output that a module's first call is compared with.

        Args:
            eager: the module's own code.
            grouped: gives the grouped form of it, if it has one now.
        """
        form = None if grouped is None else grouped()
        if form is None:
            return eager, Code()
        own = Code(form.kind)
        if form.kind in self._kinds or any(one.code == own for one in self._waiting.values()):
            return form.forward, Code(form.kind, own=False)
        return eager, own

    def add(
        self,
        layer: MoELayer,
        dtype: torch.dtype,
        sample: Sample,
        code: Code,
        ours: Tensor,
        own: Tensor,
    ) -> None:
        """Compares a layer's first call; the result is read by `settle`.

        Args:
            layer: it.
            dtype: in which it computes.
            sample: the tokens.
            code: what computed `own`.
            ours, own: [n, H], the output of these tokens.
        """
        truth = own.double()
        figures = [
            torch.linalg.vector_norm(ours.double() - truth),
            torch.linalg.vector_norm(truth),
            (~truth.isfinite()).any(dim=-1).sum(),
            torch.ones((), device=own.device) if sample.counted is None else sample.counted,
        ]
        stacked = torch.stack([figure.double() for figure in figures])
        self._waiting[layer.name] = _Comparison(layer, dtype, code, len(truth), stacked)

    def drop(self) -> None:
        """Forgets the comparisons of a forward that failed; its layers are compared again."""
        self._waiting = {}

    def settle(self, check_finite: Callable[[], None]) -> None:
        """Reads the comparisons of the forward that has ended; waits for the device if there are
        any. If it raises, no layer of the forward has passed.

        Args:
            check_finite: raises DataError for the first layer whose statistics hold NaN or Inf; it
                may be the cause of these of a later one.

        Raises:
            UnsupportedModel: a layer's output differs from its module's own.
            DataError: a module's own output is not finite.
        """
        waiting, self._waiting = list(self._waiting.values()), {}
        counted = []
        for comparison, figures in zip(waiting, _read(waiting), strict=True):
            if figures[3]:
                _check(comparison, figures, check_finite)
                counted.append(comparison)
        codes = {one.layer.name: one.code for one in counted}
        self._kinds |= {code.kind for code in codes.values() if code.own} - {None}
        passed = (name for name, code in codes.items() if code.own or code.kind in self._kinds)
        self._passed.update(passed)


def _read(waiting: list[_Comparison]) -> Iterator[list[float]]:
    """The figures of comparisons, by one copy from each device."""
    devices = {one.figures.device: None for one in waiting}
    read = {
        device: iter(
            torch.stack([one.figures for one in waiting if one.figures.device == device]).tolist()
        )
        for device in devices
    }
    return (next(read[one.figures.device]) for one in waiting)


def _check(one: _Comparison, figures: list[float], check_finite: Callable[[], None]) -> None:
    """Raises unless a layer's output equals the module's own within the dtype's tolerance."""
    difference, scale, bad, _ = figures
    name, dtype, tolerance = one.layer.name, one.dtype, _TOLERANCE[one.dtype]
    if bad:
        if one.layer.local is None:
            check_finite()  # an earlier layer may be the cause
        raise DataError(
            f"{name}: the model's own experts return NaN or Inf for {int(bad)} of {one.rows} "
            f"tokens in {dtype}; check the checkpoint's weights, or load it in a wider dtype"
        )
    error = difference / (scale or 1.0)
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{name} ({type(one.layer.module).__name__}): our output differs from the module's own "
            f"by {error:.2e} relative, {tolerance:.0e} is allowed for {dtype}; this version does "
            "not support what this model computes"
        )
