"""Activations: what an expert computes between its two products, and how to recognize it.

An expert is `f(x) = down(act(up(x)))`. `act` is one of six closed formulas that kernels can fuse,
or `opaque`: a torch function called between the two products. Which one a model uses is measured by
probing its own function, never guessed from a name.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels.errors import ShapeError, UnsupportedModel

Gated = Callable[[Tensor, Tensor, float, float], Tensor]


# The first factor is a fresh tensor, so the product goes into it: one buffer less for each piece.


def _silu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    return torch.nn.functional.silu(gate).mul_(up)


def _gelu_tanh(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up)


def _silu_clamped_in(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    return torch.nn.functional.silu(gate.clamp(max=limit)).mul_(up.clamp(-limit, limit))


def _silu_clamped_out(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    return torch.nn.functional.silu(gate).clamp_(max=limit).mul_(up.clamp(-limit, limit))


def _swiglu_oai(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(gate * alpha) * (up.clamp(-limit, limit) + 1)


_GATED: dict[str, Gated] = {
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "silu_clamped_in": _silu_clamped_in,
    "silu_clamped_out": _silu_clamped_out,
    "swiglu_oai": _swiglu_oai,
}
_LIMITED = ("silu_clamped_in", "silu_clamped_out", "swiglu_oai")
KINDS = (*_GATED, "relu2", "opaque")


@dataclass(frozen=True)
class Activation:
    """The function between an expert's two products.

    Attributes:
        kind: one of `KINDS`. With g, u the gate and up halves, L = limit, a = alpha:
            `silu` silu(g) u; `gelu_tanh` gelu_tanh(g) u; `relu2` relu(x)^2, no gate;
            `silu_clamped_in` silu(min(g, L)) clamp(u, -L, L);
            `silu_clamped_out` min(silu(g), L) clamp(u, -L, L);
            `swiglu_oai` g' sigmoid(a g') (clamp(u, -L, L) + 1) with g' = min(g, L);
            `opaque` calls `fn`.
        limit: clamp bound L; infinity where the activation has none.
        alpha: slope a of `swiglu_oai`.
        fn: for `opaque` only, maps [n, 2I] (gated, in the model's own layout) or [n, I] to [n, I].

    Raises:
        UnsupportedModel: an unknown kind, `fn` without kind `opaque`, or the reverse.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> rk.Activation("relu2").apply(torch.tensor([[-1.0, 2.0]]))
        tensor([[0., 4.]])
    """

    kind: str
    limit: float = math.inf
    alpha: float = 1.702
    fn: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedModel(
                f"activation {self.kind!r} is not known; use one of {', '.join(KINDS)}"
            )
        if (self.kind == "opaque") != (self.fn is not None):
            raise UnsupportedModel(
                f"activation {self.kind!r} {'needs' if self.fn is None else 'takes no'} `fn`; "
                "give a torch function with kind 'opaque' and with no other"
            )

    @property
    def gated(self) -> bool | None:
        """Whether the activation takes a gate half; None where only `fn` knows."""
        return None if self.kind == "opaque" else self.kind != "relu2"

    def apply(self, projected: Tensor, *, interleaved: bool = False) -> Tensor:
        """Evaluates the activation.

        Args:
            projected: [n, 2I] gate and up (halves, or pairs when `interleaved`), or [n, I] ungated.
            interleaved: columns are g0, u0, g1, u1, ... instead of all gates, then all ups.

        Returns:
            [n, I], same dtype.
        """
        if self.fn is not None:
            return self.fn(projected)
        if self.kind == "relu2":
            return torch.relu(projected).square_()
        if interleaved:
            gate, up = projected[:, ::2], projected[:, 1::2]
        else:
            gate, up = projected.chunk(2, dim=-1)
        return _GATED[self.kind](gate, up, self.limit, self.alpha)


def _candidates(gated: bool, limits: Sequence[float], alphas: Sequence[float]) -> list[Activation]:
    if not gated:
        return [Activation("relu2")]
    finite = [float(limit) for limit in limits if limit is not None and math.isfinite(limit)]
    found = [Activation(kind) for kind in _GATED if kind not in _LIMITED]
    found += [
        Activation(kind, limit)
        for kind in ("silu_clamped_in", "silu_clamped_out")
        for limit in finite
    ]
    found += [
        Activation("swiglu_oai", limit, float(alpha))
        for alpha in alphas or [1.702]
        for limit in [*finite, math.inf]
    ]
    return found


def probe_activation(
    fn: Callable[[Tensor], Tensor],
    *,
    intermediate_size: int,
    gated: bool,
    interleaved: bool = False,
    limits: Sequence[float] = (),
    alphas: Sequence[float] = (),
    device: torch.device | str = "cpu",
) -> Activation:
    """Recognizes a module's activation by its values, in float32 whatever the model's dtype.

    Args:
        fn: maps [n, 2I] (or [n, I] when not gated) to [n, I], the module's own.
        intermediate_size: I.
        gated: whether `fn` takes gate and up.
        interleaved: layout of the columns of `fn`'s argument.
        limits: clamp bounds the module carries; each is tried.
        alphas: slopes the module carries; each is tried.
        device: device of the probe.

    Returns:
        The closed formula whose values agree on 64 random rows that reach past every limit, or an
        `opaque` activation around `fn` when none does.

    Raises:
        ShapeError: `fn` does not return [64, I].

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> def fn(projected):
        ...     gate, up = projected.chunk(2, dim=-1)
        ...     return torch.nn.functional.silu(gate) * up
        >>> rk.probe_activation(fn, intermediate_size=16, gated=True).kind
        'silu'
    """
    reach = 4.0 * max([2.0, *(abs(x) for x in limits if x is not None and math.isfinite(x))])
    width = 2 * intermediate_size if gated else intermediate_size
    seed = torch.Generator().manual_seed(0)
    unit = torch.rand(64, width, generator=seed, dtype=torch.float64) * 2 - 1
    # Odd powers keep half the probe near zero, where the formulas differ in curvature, and the rest
    # far out, where they differ in clamping.
    probe = (unit**3 * reach).to(dtype=torch.float32, device=device)
    with torch.no_grad():
        got = fn(probe)
        if got.shape != (64, intermediate_size):
            raise ShapeError(
                f"the activation returned {tuple(got.shape)} for a probe of "
                f"{tuple(probe.shape)}; expected (64, {intermediate_size}): check "
                "intermediate_size and gated"
            )
        for activation in _candidates(gated, limits, alphas):
            want = activation.apply(probe, interleaved=interleaved).double()
            error = (got.double() - want).norm() / want.norm()
            if bool(error <= 1e-5):
                return activation
    return Activation("opaque", fn=fn)
