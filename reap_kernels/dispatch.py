"""Which backend serves an op, and why the others do not.

Each op registers its backends with a `supports` function that returns a reason for refusing a
request, or None. Automatic choice takes the backend of highest priority for the request that has
no reason. An explicit request (argument `backend=` or `REAP_BACKEND`) never falls back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reap_kernels import env
from reap_kernels.errors import BackendUnavailable

OPS = env.OPS


@dataclass(frozen=True)
class Sizes:
    """T, k, E, H and I of a call; by default those of Qwen3-30B-A3B on 16,384 tokens."""

    tokens: int = 16384
    top_k: int = 8
    experts: int = 128
    hidden: int = 2048
    intermediate: int = 768

    @property
    def rows(self) -> float:
        """Mean rows an expert, which is what tiles are chosen by."""
        return self.tokens * self.top_k / self.experts


@dataclass(frozen=True)
class Request:
    """What a call needs, as far as choosing a backend goes.

    Attributes:
        op: one of `OPS`.
        device: where the inputs lie.
        dtype: dtype of the hidden states (or of the expert outputs).
        formula: kind of the gate formula; empty where the op has none.
        sizes: of the call, or typical ones where a question is asked without one.
        layout: `ExpertWeights.layout`, where the op takes weights.
        biased: whether the experts add biases.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    formula: str = ""
    sizes: Sizes = Sizes()
    layout: str = "stacked"
    biased: bool = False


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        op: the op it implements.
        name: backend name, as users request it.
        priority: of a request; higher is tried first.
        supports: reason for refusing a request, or None.
        run: the implementation.
        note: how it would serve a request, where that needs saying; else empty.
    """

    op: str
    name: str
    priority: Callable[[Request], int]
    supports: Callable[[Request], str | None]
    run: Callable[..., Any]
    note: Callable[[Request], str] = lambda request: ""


@dataclass(frozen=True)
class Verdict:
    """One line of `explain()`: a backend, the reason it is not chosen (None: it is), and how it
    serves where that needs saying.
    """

    op: str
    backend: str
    reason: str | None
    note: str = ""


_REGISTRY: dict[str, list[Backend]] = {op: [] for op in OPS}


def register(backend: Backend) -> None:
    """Adds a backend; a second registration of the same (op, name) is a programming error."""
    peers = _REGISTRY[backend.op]
    if any(peer.name == backend.name for peer in peers):
        raise ValueError(f"backend {backend.name!r} is already registered for op {backend.op!r}")
    peers.append(backend)


def backends(op: str) -> list[str]:
    """Names of the backends of an op."""
    return [backend.name for backend in _REGISTRY[op]]


def _ranked(request: Request) -> list[Backend]:
    """Backends of the request's op, first choice first."""
    return sorted(_REGISTRY[request.op], key=lambda peer: -peer.priority(request))


def select(request: Request, requested: str | None = None) -> Backend:
    """The backend that serves `request`.

    Args:
        request: the call.
        requested: a backend name, or None for `REAP_BACKEND`, else automatic choice.

    Raises:
        BackendUnavailable: the requested backend is unknown or refuses, or none serves; the message
            carries every reason.
    """
    requested = requested or env.backend(request.op)
    if requested is not None:
        for backend in _REGISTRY[request.op]:
            if backend.name == requested:
                reason = backend.supports(request)
                if reason is None:
                    return backend
                raise BackendUnavailable(
                    f"backend {requested!r} cannot serve op {request.op!r}: {reason}; "
                    f"request another of {', '.join(backends(request.op))}, or none"
                )
        raise BackendUnavailable(
            f"backend {requested!r} does not exist for op {request.op!r}; "
            f"choose one of {', '.join(backends(request.op))}"
        )
    return automatic(request)


def direct(tensor: Tensor) -> bool:
    """Whether a call with this input may skip torch's operator and go straight to a backend, since
    nothing compiles, traces or differentiates it. The operator costs the host more than the rest.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return type(tensor) is Tensor and not torch._C._len_torch_dispatch_stack()


def automatic(request: Request) -> Backend:
    """The backend of highest priority that serves `request`, whatever `REAP_BACKEND` says.

    Raises:
        BackendUnavailable: none serves; the message carries every reason.
    """
    reasons = []
    for backend in _ranked(request):
        reason = backend.supports(request)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise BackendUnavailable(f"no backend serves op {request.op!r}: {'; '.join(reasons)}")


def explain(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    formula: str = "silu",
    sizes: Sizes | None = None,
    layout: str = "stacked",
    biased: bool = False,
    backend: str | None = None,
) -> list[Verdict]:
    """Which backend each op would take for such a call, and why not the others.

    Args:
        device: where the inputs would lie.
        dtype: dtype of the hidden states.
        formula: kind of gate formula; `opaque` for one that only the model can compute.
        sizes: T, k, E, H and I; default those of a typical call.
        layout: `ExpertWeights.layout`.
        biased: whether the experts add biases.
        backend: an explicit request, as in the ops.

    Returns:
        One `Verdict` per (op, backend), first choice first; `reason` is None for the one chosen.
    """
    verdicts = []
    for op in OPS:
        requested = backend or env.backend(op)
        request = Request(
            op, torch.device(device), dtype, formula, sizes or Sizes(), layout, biased
        )
        chosen: str | None = None
        for peer in _ranked(request):
            reason = peer.supports(request)
            if reason is None and requested is not None and peer.name != requested:
                reason = f"{requested} was requested"
            if reason is None and chosen is not None:
                reason = f"{chosen} comes first"
            if reason is None:
                chosen = peer.name
            verdicts.append(Verdict(op, peer.name, reason, peer.note(request)))
    return verdicts
