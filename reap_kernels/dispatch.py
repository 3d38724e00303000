"""Which backend serves an op, and why the others do not.

Each op registers its backends with a `supports` function that returns a reason for refusing a
request, or None. Automatic choice takes the backend of highest priority for the request that has
no reason. An explicit request (argument `backend=` or `REAP_BACKEND`) never falls back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reap_kernels import env
from reap_kernels.activation import KINDS
from reap_kernels.device import tf32
from reap_kernels.errors import BackendUnavailable, DtypeError, ShapeError, UsageError
from reap_kernels.quantized import FORMATS
from reap_kernels.types import FLOATS, INTEGERS, LAYOUTS

OPS = env.OPS


class Sizes(NamedTuple):
    """T, k, E, H, I and D of a call; by default those of Qwen3-30B-A3B on 16,384 tokens.

    D is the width of a head of the attention, which `rotary` alone depends on.

    Example:
        >>> rk.Sizes(tokens=512, top_k=2, experts=8).rows  # mean rows per expert
        128.0
    """

    tokens: int = 16384
    top_k: int = 8
    experts: int = 128
    hidden: int = 2048
    intermediate: int = 768
    head: int = 128

    @property
    def rows(self) -> float:
        """Mean number of rows per expert, which tiles are chosen by."""
        return self.tokens * self.top_k / self.experts


class Request(NamedTuple):
    """What a call needs, as far as choosing a backend goes. A tuple, because one is made and hashed
    in every call.

    Attributes:
        op: one of `OPS`.
        device: where the inputs lie.
        dtype: dtype of the hidden states (or of the expert outputs).
        activation: kind of the activation; empty where the op has none.
        sizes: of the call, or typical ones where a question is asked without one.
        layout: `ExpertWeights.layout`, where the op takes weights.
        biased: whether the experts add biases.
        gram: whether a layer is asked for Gram matrices too.
        boxes: how TMA can read gate and up: as one, `fused` where all gates come before all ups (or
            there are none), `interleaved`; or `apart` (two tensors, a tensor for each expert, or
            one matrix for all); empty where strides or addresses do not allow it.
        block: rows and columns of the elements that share a scale, of experts in `fp8_block`; None
            for all others.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    activation: str = ""
    sizes: Sizes = Sizes()
    layout: str = "stacked"
    biased: bool = False
    gram: bool = False
    boxes: str = "fused"
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        op: the op it implements.
        name: backend name, as users request it.
        priority: of a request; higher is tried first.
        supports: reason for refusing a request, or None.
        prepare: the implementation for a request that is supported, with everything decided that
            follows from the request alone: tiles, and the kernels of each stage.
        note: how it would serve a request, where that needs saying; else empty.
    """

    op: str
    name: str
    priority: Callable[[Request], int]
    supports: Callable[[Request], str | None]
    prepare: Callable[[Request], Callable[..., Any]]
    note: Callable[[Request], str] = lambda request: ""


class Resolved(NamedTuple):
    """The backend that serves a request, and its implementation, ready to be called."""

    backend: Backend
    run: Callable[..., Any]

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend.name


class Passing(str):
    """A reason for a refusal that may not hold for the next call, such as a CUDA graph that is
    being captured: nothing that was chosen because of it is kept.
    """


@dataclass(frozen=True)
class Verdict:
    """One line of `explain()`: a backend, the reason it is not chosen (None: it is), and how it
    serves where that needs saying.

    Example:
        >>> import reap_kernels as rk
        >>> print(rk.explain("cpu", backend="reference")[0])
        sort, cpu: not chosen: reference was requested
    """

    op: str
    backend: str
    reason: str | None
    note: str = ""

    def __str__(self) -> str:
        said = "chosen" if self.reason is None else f"not chosen: {self.reason}"
        return f"{self.op}, {self.backend}: {said}{f' ({self.note})' if self.note else ''}"


_REGISTRY: dict[str, list[Backend]] = {op: [] for op in OPS}
# What was chosen, by all that the choice depends on and that can change while a process lives: the
# request, the backend asked for (`REAP_BACKEND` is read in every call), the other variables of the
# environment, whether torch may use TF32. `register`, and `selfcheck.forget`, empty it. A choice
# that a passing reason led to is not kept, nor is a refusal. Whether Triton, `_C` and the driver
# are there is asked once in a process, by the modules that know.
_CHOSEN: dict[tuple[Any, ...], Resolved] = {}
_MOST_CHOSEN = 4096  # sequences may have any length, and each length is another request


def register(backend: Backend) -> None:
    """Adds a backend; a second registration of the same (op, name) is a programming error."""
    peers = _REGISTRY[backend.op]
    if any(peer.name == backend.name for peer in peers):
        raise ValueError(f"backend {backend.name!r} is already registered for op {backend.op!r}")
    peers.append(backend)
    forget()


def always(run: Callable[..., Any]) -> Callable[[Request], Callable[..., Any]]:
    """`Backend.prepare` of an implementation that is the same for every request."""
    return lambda request: run


def forget() -> None:
    """Drops the choices that were kept, so that the next call chooses anew."""
    _CHOSEN.clear()


def backends(op: str) -> list[str]:
    """Names of the backends of an op."""
    return [backend.name for backend in _REGISTRY[op]]


def _ranked(request: Request) -> list[Backend]:
    """Backends of the request's op, first choice first."""
    return sorted(_REGISTRY[request.op], key=lambda peer: -peer.priority(request))


def select(request: Request, requested: str | None = None) -> Resolved:
    """The backend that serves `request`.

    Args:
        request: the call.
        requested: a backend name, or None for `REAP_BACKEND`, else automatic choice.

    Raises:
        BackendUnavailable: the requested backend is unknown or refuses, or none serves; the message
            carries every reason.
    """
    return _kept(request, requested or env.backend(request.op))


def automatic(request: Request) -> Resolved:
    """The backend of highest priority that serves `request`, whatever `REAP_BACKEND` says.

    Raises:
        BackendUnavailable: none serves; the message carries every reason.
    """
    return _kept(request, None)


def _kept(request: Request, requested: str | None) -> Resolved:
    """The choice that was kept for such a request, or a new one."""
    key = (request, requested, tf32(request.dtype), env.conditions())
    found = _CHOSEN.get(key)
    if found is not None:
        return found
    backend, lasting = _choose(request, requested)
    found = Resolved(backend, backend.prepare(request))
    # Without an index, a device is the one that is current now.
    if lasting and (request.device.index is not None or request.device.type == "cpu"):
        if len(_CHOSEN) >= _MOST_CHOSEN:
            forget()
        _CHOSEN[key] = found
    return found


def _choose(request: Request, requested: str | None) -> tuple[Backend, bool]:
    """The backend that serves, and whether it will as long as the process lives."""
    op = request.op
    if requested is not None:
        for backend in _REGISTRY[op]:
            if backend.name == requested:
                reason = backend.supports(request)
                if reason is None:
                    return backend, True
                raise BackendUnavailable(
                    f"backend {requested!r} cannot serve op {op!r}: {reason}; "
                    f"request another of {', '.join(backends(op))}, or none"
                )
        raise BackendUnavailable(
            f"backend {requested!r} does not exist for op {op!r}; "
            f"choose one of {', '.join(backends(op))}"
        )
    reasons: list[str] = []
    lasting = True
    for backend in _ranked(request):
        reason = backend.supports(request)
        if reason is None:
            return backend, lasting
        lasting = lasting and not isinstance(reason, Passing)
        reasons.append(f"{backend.name}: {reason}")
    raise BackendUnavailable(f"no backend serves op {op!r}: {'; '.join(reasons)}")


def direct(tensor: Tensor) -> bool:
    """Whether a call with this input may skip torch's operator and go straight to a backend, since
    nothing compiles, traces or differentiates it. The operator costs the host more than the rest.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return type(tensor) is Tensor and not torch._C._len_torch_dispatch_stack()


def check_backend(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype,
    backend: str | None = None,
    *,
    sizes: Sizes | None = None,
    activation: str = "silu",
    layout: str = "stacked",
    biased: bool = False,
    quantized: str | None = None,
    gram: bool = False,
) -> str:
    """Checks, before any work is done, that a call will be served, and by which backend. What is
    left out is taken from a typical call: `explain` gives the reasons of all backends.

    Args:
        op: one of `dispatch.OPS`: `sort`, `dequant`, `experts`, `saliency`, `gram`, `layer`,
            `cross`, `compare`, `norm`, `rotary`.
        device: where the inputs will lie.
        dtype: of the hidden states (`layer`, `experts`, `cross`), expert outputs (`saliency`),
            inner activations (`gram`), logits (`compare`), rows (`norm`), queries (`rotary`),
            expert ids (`sort`) or dequantized matrices (`dequant`).
        backend: an explicit request, as in the ops. Default: `REAP_BACKEND`, else automatic choice.
        sizes: T, k, E, H, I and D of the call. Default: those of Qwen3-30B-A3B on 16,384 tokens.
        activation: kind of the experts' activation; `opaque` for one that only the model can
            compute.
        layout: `ExpertWeights.layout`.
        biased: whether the experts add biases.
        quantized: format of the experts (`fp8_block`, `mxfp4`, `int4_group`), or None where they
            are not quantized.
        gram: whether a layer is to sum Gram matrices too (`observe_layer(gram=)`).

    Returns:
        The name of the backend that serves.

    Raises:
        UsageError: `op`, `device`, `activation` or `layout` is none that there is.
        DtypeError: the op takes no such dtype, or `quantized` is no format that is read.
        ShapeError: a size is below 1, or k above E.
        BackendUnavailable: the device is not here, the requested backend is unknown or refuses, or
            none serves; the message carries every reason.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> rk.check_backend("layer", "cpu", torch.float32, backend="reference")
        'reference'
        >>> small = rk.Sizes(tokens=512, top_k=2, experts=8, hidden=1024, intermediate=256)
        >>> rk.check_backend(
        ...     "layer", "cpu", torch.bfloat16, "cpu", sizes=small, quantized="fp8_block", gram=True
        ... )
        'cpu'
        >>> rk.check_backend("layer", "cpu", torch.bfloat16, quantized="nvfp4")
        Traceback (most recent call last):
        ...
        reap_kernels.errors.DtypeError: quantized='nvfp4' is no format that is read; ...
    """
    for name, value, known in (
        ("op", op, OPS),
        ("activation", activation, KINDS),
        ("layout", layout, LAYOUTS),
    ):
        if value not in known:
            raise UsageError(f"{name} {value!r} is not known; choose one of {', '.join(known)}")
    _check_dtype(op, dtype, quantized)
    sizes = sizes or Sizes()
    if min(sizes) < 1 or sizes.top_k > sizes.experts:
        raise ShapeError(f"sizes is {sizes}; give sizes above 0, and top_k up to experts")
    return select(
        Request(
            op,
            _present(device),
            dtype,
            activation if op in ("experts", "layer", "cross") else "",
            sizes,
            layout if quantized is None else "quantized",
            biased,
            gram,
            block=_block_of(quantized),
        ),
        backend,
    ).name


def _block_of(quantized: str | None) -> tuple[int, int] | None:
    """`Request.block` of experts in a format, where no call is there to tell."""
    return (128, 128) if quantized == "fp8_block" else None


def _check_dtype(op: str, dtype: torch.dtype, quantized: str | None) -> None:
    """Raises DtypeError unless an op takes inputs of this dtype, and experts of this format."""
    if quantized is not None and quantized not in FORMATS:
        raise DtypeError(
            f"quantized={quantized!r} is no format that is read; give one of "
            f"{', '.join(FORMATS)}, or dequantize the experts"
        )
    allowed: tuple[torch.dtype, ...] = FLOATS
    if op == "sort":
        allowed = INTEGERS
    elif op in ("compare", "norm", "rotary"):  # which compute in float32
        allowed = tuple(kind for kind in FLOATS if kind != torch.float64)
    elif op == "dequant" or quantized is not None:
        allowed = (torch.bfloat16,)
    if dtype not in allowed:
        what = f"op {op!r}" + (f" with experts in {quantized}" if quantized else "")
        raise DtypeError(f"{what} takes {', '.join(map(str, allowed))}, not {dtype}; convert first")


def _present(device: torch.device | str) -> torch.device:
    """The device, where this machine has it.

    Raises:
        UsageError: it is none that torch knows.
        BackendUnavailable: it is a GPU that torch does not find.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device {device!r} is not known; give one such as 'cuda:0'") from error
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise BackendUnavailable(
            f"device {str(found)!r} is not here: torch finds {count} GPUs; give another device"
        )
    return found


def explain(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    activation: str = "silu",
    sizes: Sizes | None = None,
    layout: str = "stacked",
    biased: bool = False,
    gram: bool = False,
    backend: str | None = None,
    quantized: str | None = None,
) -> list[Verdict]:
    """Which backend each op would take for such a call, and why not the others.

    Args:
        device: where the inputs would lie.
        dtype: dtype of the hidden states.
        activation: kind of activation; `opaque` for one that only the model can compute.
        sizes: T, k, E, H, I and D; default those of a typical call.
        layout: `ExpertWeights.layout`.
        biased: whether the experts add biases.
        gram: whether the layer is asked for Gram matrices too.
        backend: an explicit request, as in the ops.
        quantized: format of the experts (`fp8_block`, in blocks of 128 x 128; `mxfp4`,
            `int4_group`), or None where they are not quantized, or `layout` says only that they
            are.

    Returns:
        One `Verdict` per (op, backend), first choice first; `reason` is None for the one chosen.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> found = rk.explain("cpu", torch.float32, backend="reference")
        >>> {verdict.backend for verdict in found if verdict.reason is None}
        {'reference'}
    """
    verdicts = []
    layout = layout if quantized is None else "quantized"
    for op in OPS:
        requested = backend or env.backend(op)
        request = Request(
            op,
            torch.device(device),
            dtype,
            activation,
            sizes or Sizes(),
            layout,
            biased,
            gram,
            block=_block_of(quantized),
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
