"""Where a model computes a norm or a rotation: runs the kernel there, checked on its first call.

The first call of every kind is compared, on a small part of the real input, with the model's own
code, before its result is used. Where they differ, the model's own code runs from then on, and the
reason is kept.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import reap_kernels
from reap_driver.fusing.deferred import Normed, Sum, plain
from reap_driver.fusing.norms import NormFormula
from reap_driver.fusing.rotary_formula import Form, Layout, Rotation, layout_of, relation

_ROWS = 4  # positions of the first call of a rotation that are compared

# Largest accepted ||ours - own|| / ||own|| on them: one unit of rounding for every element. The
# kernels have no other dtypes.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


class Site:
    """A place where a kernel runs instead of the model's own code.

    Attributes:
        name: of the module or function.
        left: why the model's own code runs again; empty while the kernel does.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.left = ""
        self._agreed: set[Any] = set()

    def runs(self, *given: Any) -> bool:
        """Whether the kernel takes a call: no gradients, no tracing, tensors on a device."""
        if self.left or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return all(
            type(one) is Tensor and one.dtype in TOLERANCE and one.numel() and not one.is_meta
            for one in given
        )

    def agrees(
        self, key: Any, where: torch.device, pairs: Callable[[], Sequence[tuple[Any, Tensor]]]
    ) -> bool:
        """Whether calls of a kind have the values of the model's own code; compared once, and once
        more in each dtype of autocast, which the model's own code may follow.

        Args:
            key: the kind.
            where: the device of the call.
            pairs: computes pairs of the model's own tensor and ours, on a few rows.
        """
        key = key, autocast_of(where)
        if key not in self._agreed and not self.left:
            reason = next(filter(None, (difference(*pair) for pair in pairs())), "")
            if reason:  # never taken back by another thread's comparison
                self.left = reason
            self._agreed.add(key)
        return not self.left


def autocast_of(where: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device; None outside of it."""
    kind = where.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def difference(own: Any, ours: Tensor) -> str:
    """In what our values differ from the model's own; empty if they do not."""
    if not isinstance(own, Tensor) or (own.shape, own.dtype) != (ours.shape, ours.dtype):
        return "its first call returned another shape or dtype than the kernel"
    truth = own.double()
    if not bool(truth.isfinite().all()):
        return "its first call returned NaN or Inf, so it cannot be compared with the kernel"
    error = float((ours.double() - truth).norm() / truth.norm().clamp_min(1e-300))
    if error <= TOLERANCE[own.dtype]:
        return ""
    allowed = f"{TOLERANCE[own.dtype]:.0e} is allowed for {own.dtype}"
    return f"its first call differs from the kernel by {error:.2e} relative, {allowed}"


def few(x: Tensor) -> Tensor:
    """A small part of a norm's input, with as many dimensions and whole rows: the first and the
    last of each dimension, so that padding on one side, which may be zero, is not all of it.
    """
    return x[tuple(slice(None, None, max(size - 1, 1)) for size in x.shape[:-1])]


class NormSite(Site):
    """A norm.

    Attributes:
        formula: what it computes.
        head: whether its output is rotated, so that the rotation takes it over.
        sums: number of calls that added a residual too.
        rotations: number of calls that a rotation took over.
    """

    def __init__(self, name: str, weight: str, formula: NormFormula, backend: str | None) -> None:
        super().__init__(name)
        self._weight = weight  # name of the module's parameter
        self.formula, self.head = formula, False
        self._backend = backend
        self.sums = self.rotations = 0

    def forward(
        self, module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """What runs instead of the module's forward."""
        x = args[0] if len(args) == 1 and not kwargs else None
        weight = getattr(module, self._weight)  # copies of `DataParallel` hold it as an attribute
        if isinstance(x, Sum) and x.parts is not None and self.runs(*x.parts):
            return self._added(own, x, weight)
        x = plain(x)
        if x is None or weight is None or not self.runs(x):
            return own(*args, **kwargs)
        if not self.agrees(x.dtype, x.device, lambda: [(own(few(x)), self._norm(few(x), weight))]):
            return own(x)
        if self.head and x.dim() == 4 and weight.dtype == x.dtype and not x.is_inference():
            return Normed.of(x, self, own, weight)
        return self._norm(x, weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.formula(x, weight, self._backend)

    def computed_alone(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm of queries or keys that no rotation took over; later calls are not deferred."""
        self.head = False
        return self._norm(x, weight)

    def _added(self, own: Callable[..., Any], x: Sum, weight: Any) -> Any:
        """The norm of a sum, which is computed along."""
        parts = x.parts
        assert parts is not None
        residual, added = parts

        def pairs() -> list[tuple[Any, Tensor]]:
            out, total = self._both(few(residual), few(added), weight)
            whole = few(residual) + few(added)
            return [(own(whole), out), (whole, total)]

        if not self.agrees((residual.dtype, "sum"), residual.device, pairs):
            return own(x.value())
        out, total = self._both(residual, added, weight)
        x.settle(total)
        self.sums += 1
        return out

    def _both(self, residual: Tensor, added: Tensor, weight: Any) -> tuple[Tensor, Tensor]:
        out, total = reap_kernels.rms_norm(
            added,
            weight,
            residual=residual,
            backend=self._backend,
            **self.formula.arguments,
        )
        return out, total


class RotarySite(Site):
    """A function that rotates queries and keys.

    Attributes:
        own: the function that stands in its Python module.
        form: how it takes its arguments.
        backend: of `rotary`; None for the best one.
        calls: number of calls that the kernel took.
        unlike: of the last call that it did not take, in what layout it was; empty for none.
        ended: whether all contexts that used it have ended. Code that was imported inside one may
            hold it for good; it runs the model's own code from then on.
    """

    def __init__(self, name: str, own: Rotation, form: Form, backend: str | None) -> None:
        super().__init__(name)
        self.own, self.form, self.backend = own, form, backend
        self._layouts: dict[Any, Layout | None] = {}
        self._watches: dict[int, Callable[[list[Any]], None]] = {}  # by thread
        self.calls = self._users = 0
        self.unlike, self.ended = "", False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Inside, a context uses it."""
        self._users, self.ended = self._users + 1, False
        try:
            yield
        finally:
            self._users -= 1
            self.ended = not self._users

    @contextlib.contextmanager
    def watched(self, watch: Callable[[list[Any]], None]) -> Iterator[None]:
        """Inside, calls of this thread show what they would rotate to `watch`, and return it as it
        is.
        """
        self._watches[threading.get_ident()] = watch
        try:
            yield
        finally:
            del self._watches[threading.get_ident()]

    def fits(self) -> bool:
        """Whether it has one of the layouts in float32."""
        single = torch.float32
        return any(
            layout_of(self.own, self.form, columns, single, single, reap_kernels.rotary)
            for columns in ("all", "half")
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What runs instead of the function."""
        off = self.left or self.ended or torch.compiler.is_compiling()
        call = None if off else self._read(args, kwargs)
        if call is None:
            return self.own(*args, **kwargs)
        heads, cos, sin, swapped = call
        watch = self._watches.get(threading.get_ident())
        if watch is not None:
            watch(heads)
            return tuple(heads) if len(heads) == 2 else heads[0]
        if torch.is_grad_enabled():
            return self.own(*args, **kwargs)
        norms = _norms(heads)
        sources = [plain(one) if norms is None else one.source for one in heads]
        if swapped:
            sources = [one.transpose(1, 2) for one in sources]
        layout = None
        if self.runs(*sources, cos, sin):
            layout = self.layout(cos.shape[-1], sources[0], cos.dtype)
        if layout is None:
            kind = f"{sources[0].shape[-1]} columns in {sources[0].dtype}"
            self.unlike = f"rotates heads of {kind} in none of the layouts that the kernel has"
            return self.own(*args, **kwargs)
        extra = {} if norms is None else _weights(norms)

        def pairs() -> list[tuple[Any, Tensor]]:
            # The last positions: at the first one every angle is 0.
            last = [one[-1:, :, -_ROWS:] for one in sources]
            at = cos[-1:, -_ROWS:], sin[-1:, -_ROWS:]
            own = last if norms is None else [n.own(x) for n, x in zip(norms, last, strict=True)]
            truth = self.own(*own, *at, **self.form.first)
            return [
                *zip(_tuple(truth), self._rotated(last, at[0], at[1], layout, extra), strict=True)
            ]

        key = (layout, sources[0].dtype, None if norms is None else norms[0].site.formula)
        if not self.agrees(key, cos.device, pairs):
            return self.own(*args, **kwargs)
        found = self._rotated(sources, cos, sin, layout, extra)
        self.calls += 1
        for one in norms or ():
            one.site.rotations += 1
        turned = tuple(one.transpose(1, 2) if swapped else one for one in found)
        return turned if len(turned) == 2 else turned[0]

    def _read(self, args: Any, kwargs: Any) -> tuple[list[Any], Tensor, Tensor, bool] | None:
        """Heads, cos, sin, and whether tokens come before heads; None for what no kernel takes."""
        try:
            bound = self.form.signature.bind(*args, **kwargs)
        except TypeError:
            return None
        if not self.form.takes(bound.arguments):
            return None
        bound.apply_defaults()
        given = dict(bound.arguments)
        values = list(given.values())
        heads, (cos, sin) = values[: self.form.tensors], (given.pop("cos"), given.pop("sin"))
        dimension = given.get("unsqueeze_dim", 1)
        if not all(isinstance(one, Tensor) and one.dim() == 4 for one in heads):
            return None
        fits = all(isinstance(one, Tensor) and one.dim() == 3 for one in (cos, sin))
        if not fits or dimension not in (1, 2):
            return None
        if (cos.shape, cos.dtype) != (sin.shape, sin.dtype):
            return None
        kinds = {(x.shape[0], x.shape[3 - dimension], x.shape[3], x.dtype) for x in heads}
        batch, tokens, *_ = next(iter(kinds))
        if len(kinds) > 1 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
            return None
        return heads, plain(cos), plain(sin), dimension == 2

    def layout(self, columns: int, heads: Tensor, angles: torch.dtype) -> Layout | None:
        """The layout for heads of this shape and dtype; probed once."""
        key = (relation(columns, heads.shape[-1]), heads.dtype, angles)
        if key not in self._layouts:
            self._layouts[key] = layout_of(self.own, self.form, *key, reap_kernels.rotary)
        return self._layouts[key]

    def _rotated(
        self, heads: list[Tensor], cos: Tensor, sin: Tensor, layout: Layout, extra: Any
    ) -> list[Tensor]:
        """Queries and, where there are, keys."""
        queries, keys = heads[0], heads[1] if len(heads) > 1 else None
        arguments = layout.arguments(cos, sin, heads[0].shape[-1])
        found: tuple[Any, ...] = reap_kernels.rotary(
            queries, keys, **arguments, **extra, backend=self.backend
        )
        return list(found[: len(heads)])


def _norms(heads: list[Any]) -> list[Normed] | None:
    """The norms that can be computed along with a rotation; None where not all can."""
    found = [one for one in heads if isinstance(one, Normed) and one.pending]
    formulas = {one.site.formula for one in found}
    return found if len(found) == len(heads) and len(formulas) == 1 else None


def _weights(norms: list[Normed]) -> dict[str, Any]:
    """Their arguments of `rotary`."""
    weights = zip(("q_weight", "k_weight"), (one.weight for one in norms), strict=False)
    return {**norms[0].site.formula.arguments, **dict(weights)}


def _tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)
