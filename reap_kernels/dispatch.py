"""Which backend serves an op, and why the others do not.

Each op registers its backends with a `supports` function that returns a reason for refusing a
request, or None. Automatic choice takes the first backend, in registration order by priority, that
has no reason. An explicit request (argument `backend=` or `REAP_BACKEND`) never falls back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from reap_kernels import env
from reap_kernels.errors import BackendUnavailable

OPS = ("route", "experts", "saliency", "layer")


@dataclass(frozen=True)
class Request:
    """What a call needs, as far as choosing a backend goes.

    Attributes:
        op: one of `OPS`.
        device: where the inputs lie.
        dtype: dtype of the hidden states (or of the expert outputs).
        formula: kind of the gate formula; empty where the op has none.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    formula: str = ""


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        op: the op it implements.
        name: backend name, as users request it.
        priority: higher is tried first.
        supports: reason for refusing a request, or None.
        run: the implementation.
    """

    op: str
    name: str
    priority: int
    supports: Callable[[Request], str | None]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """One line of `explain()`: a backend, and the reason it is not chosen (None: it is)."""

    op: str
    backend: str
    reason: str | None


_REGISTRY: dict[str, list[Backend]] = {op: [] for op in OPS}


def register(backend: Backend) -> None:
    """Adds a backend; a second registration of the same (op, name) is a programming error."""
    peers = _REGISTRY[backend.op]
    if any(peer.name == backend.name for peer in peers):
        raise ValueError(f"backend {backend.name!r} is already registered for op {backend.op!r}")
    peers.append(backend)
    peers.sort(key=lambda peer: -peer.priority)


def backends(op: str) -> list[str]:
    """Names of the backends of an op, first choice first."""
    return [backend.name for backend in _REGISTRY[op]]


def select(request: Request, requested: str | None = None) -> Backend:
    """The backend that serves `request`.

    Args:
        request: the call.
        requested: a backend name, or None for `REAP_BACKEND`, else automatic choice.

    Raises:
        BackendUnavailable: the requested backend is unknown or refuses, or none serves; the message
            carries every reason.
    """
    requested = requested or env.backend()
    peers = _REGISTRY[request.op]
    if requested is not None:
        for backend in peers:
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
    reasons = []
    for backend in peers:
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
    backend: str | None = None,
) -> list[Verdict]:
    """Which backend each op would take for such a call, and why not the others.

    Args:
        device: where the inputs would lie.
        dtype: dtype of the hidden states.
        formula: kind of gate formula.
        backend: an explicit request, as in the ops.

    Returns:
        One `Verdict` per (op, backend), first choice first; `reason` is None for the one chosen.
    """
    verdicts = []
    requested = backend or env.backend()
    for op in OPS:
        request = Request(op, torch.device(device), dtype, formula)
        chosen: str | None = None
        for peer in _REGISTRY[op]:
            reason = peer.supports(request)
            if reason is None and requested is not None and peer.name != requested:
                reason = f"{requested} was requested"
            if reason is None and chosen is not None:
                reason = f"{chosen} comes first"
            if reason is None:
                chosen = peer.name
            verdicts.append(Verdict(op, peer.name, reason))
    return verdicts
