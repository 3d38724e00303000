"""Measures a launch table on the GPU at hand: offline, once, for the shapes of given models.

Each candidate launch is compared with a float32 product before it is timed, so that a tile the
compiler gets wrong cannot win. Nothing here runs while a model is observed.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reap_kernels import cuda, device
from reap_kernels.activation import Activation
from reap_kernels.errors import BackendUnavailable
from reap_kernels.layer.call import LayerCall
from reap_kernels.layer.triton_backend import grouped_limits
from reap_kernels.saliency.stage_kernels import stage_kernels
from reap_kernels.testing import relative_error
from reap_kernels.tuning import (
    KERNELS,
    PRODUCTS,
    Entry,
    Launch,
    Launches,
    Table,
    ordered,
    table_dtype,
)
from reap_kernels.types import ExpertWeights

# Upper bounds of the buckets of rows per expert, and the rows each is measured at.
BUCKETS = ((16, 16), (64, 64), (255, 192), (None, 1024))
_BOUND = 1e-2
_ROUNDS = 30

# Milliseconds a call takes.
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Shape:
    """E, k, H and I of one MoE layer."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class Measured:
    """One candidate: its launch, and its milliseconds, or why it was excluded."""

    op: str
    launch: Launch
    rows: int
    milliseconds: float | None
    reason: str = ""


def cuda_timer(call: Callable[[], object]) -> float:
    """Median milliseconds of a call, by device events, after it has warmed up."""
    for _ in range(3):
        call()
    taken = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def candidates(op: str, dtype: torch.dtype, shared_memory: int, tma: bool = False) -> list[Launch]:
    """Launches whose accumulators fit in registers and whose operands fit in shared memory; with
    `tma`, of both kernels. (A persistent program also reorders in shared memory what it stores:
    one that asks for too much falls out when it is launched.)
    """
    found = []
    sizes = itertools.product((16, 64, 128), (32, 64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
    for m, n, k, warps, depth in sizes:
        launch = Launch(m, n, k, 8, warps, depth)
        if (
            4 <= launch.accumulators(op) <= 128
            and launch.shared_bytes(op, dtype.itemsize) <= shared_memory
        ):
            found.append(launch)
            # Boxes pay where tensor cores work on whole warp groups.
            if tma and dtype.itemsize == 2 and m >= 64 and k == 64:
                found.append(replace(launch, kernel="tma"))
    return found


def tune(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    where: torch.device,
    *,
    timer: Timer = cuda_timer,
    tried: Callable[[str, torch.dtype, int, bool], list[Launch]] = candidates,
    seen: Callable[[Measured], None] = lambda measured: None,
) -> Table:
    """Measures the products of every shape and bucket, and the backends of a layer's sort, of its
    saliency, and of its products (`triton` or `grouped_mm`). Other stages keep what other tables
    say. A launch by TMA comes before the quickest one through pointers, which reads any weights.

    Args:
        shapes: of the models' layers; the table's width buckets end at their I.
        dtype: bf16, fp16 or fp32.
        where: the device.
        timer: how a call is timed.
        tried: candidates of an op.
        seen: called with every candidate that was measured or fell out.

    Raises:
        BackendUnavailable: Triton does not serve the device, or no candidate gives right numbers.
    """
    reason = device.triton_refusal(where)
    if reason is not None:
        raise BackendUnavailable(
            f"launches cannot be measured on {where}: {reason}; run `tune` on the GPU that is to "
            "use the table"
        )
    entries: list[Entry] = []
    for shape in shapes:
        weights = random_experts(shape, dtype, where)
        for bound, rows in BUCKETS:
            best = {}
            for op in PRODUCTS:
                options = tried(op, dtype, device.shared_memory(where), device.tma(where))
                found = _best(op, options, shape, weights, rows, timer, seen)
                bucket = (op, table_dtype(dtype), shape.intermediate, bound)
                entries += [Entry(*bucket, launch=launch) for launch in found]
                best[op] = found[0]
            launches = Launches(best["gate_up"], best["down"])
            for op, backend in _stage_backends(launches, shape, weights, rows, timer).items():
                name = None if op == "sort" else table_dtype(dtype)
                entries.append(Entry(op, name, shape.intermediate, bound, backend=backend))
    name = "the CPU, interpreted" if where.type == "cpu" else torch.cuda.get_device_name(where)
    origin = f"measured on {name}, Triton {device.triton_version()}, torch {torch.__version__}"
    return Table(device.architecture(where), origin, ordered(entries))


def random_experts(shape: Shape, dtype: torch.dtype, where: torch.device) -> ExpertWeights:
    """Random experts of unit scale."""
    e, h, i = shape.experts, shape.hidden, shape.intermediate

    def normal(*size: int, scale: float) -> Tensor:
        return torch.randn(*size, device=where, dtype=dtype).mul_(scale)

    up = normal(e, 2 * i, h, scale=h**-0.5)
    return ExpertWeights(up, normal(e, h, i, scale=2 * i**-0.5), Activation("silu"))


def _inputs(shape: Shape, rows: int, like: ExpertWeights) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, ids and router weights of as many tokens as give `rows` rows per expert, balanced."""
    tokens = max(1, rows * shape.experts // shape.top_k)
    hidden = torch.randn(tokens, shape.hidden, device=like.device, dtype=like.dtype)
    scores = torch.rand(tokens, shape.experts, device=like.device)
    topk_weights, ids = scores.topk(shape.top_k, dim=-1)
    return hidden, ids, topk_weights


def _best(
    op: str,
    options: Sequence[Launch],
    shape: Shape,
    weights: ExpertWeights,
    rows: int,
    timer: Timer,
    seen: Callable[[Measured], None],
) -> list[Launch]:
    """The fastest launch of one product among those that compute it right; where that is by TMA,
    followed by the fastest through pointers.
    """
    found = []
    for measured in measurements(op, options, shape, weights, rows, timer):
        seen(measured)
        if measured.milliseconds is not None:
            found.append((measured.milliseconds, measured.launch))
    if not found:
        raise BackendUnavailable(
            f"no launch of {op} computes {shape} right on {weights.device}; `reap-kernels doctor` "
            "shows versions: report them"
        )
    launches = [launch for _, launch in sorted(found, key=lambda pair: pair[0])]
    best = launches[0]
    pointers = [launch for launch in launches if launch.kernel == KERNELS[0]]
    return [best] if best.kernel == KERNELS[0] else [best, *pointers[:1]]


def measurements(
    op: str,
    launches: Sequence[Launch],
    shape: Shape,
    weights: ExpertWeights,
    rows: int,
    timer: Timer,
) -> Iterator[Measured]:
    """Every candidate of one product, checked on the rows of one expert, then timed."""
    from reap_kernels.experts import gpu, product
    from reap_kernels.experts.operands import Operand
    from reap_kernels.sort.gpu import sort_slots

    hidden, ids, topk_weights = _inputs(shape, rows, weights)
    slots = sort_slots(ids, topk_weights, shape.experts)
    gated = op == "gate_up"
    a = (
        hidden
        if gated
        else torch.randn(
            len(slots.gather_index), shape.intermediate, device=hidden.device, dtype=hidden.dtype
        )
    )
    up, gate = gpu.halves(weights)
    b = up if gated else Operand.of(weights.down, None)
    want, rows_of_one = _truth(op, a, slots.gather_index, slots.offsets, shape, weights)
    for launch in launches:

        def call(launch: Launch = launch) -> Tensor:
            if gated:
                activation = weights.activation
                return product.product(
                    a, b, slots, launch, gate=gate, activation=activation, gather=True
                )
            return product.product(a, b, slots, launch)

        try:
            error = relative_error(call()[rows_of_one], want)
        except Exception as failure:  # noqa: BLE001  compilers refuse launches in many ways
            reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
            yield Measured(op, launch, rows, None, reason)
            continue
        if not error <= _BOUND:
            yield Measured(op, launch, rows, None, f"wrong numbers: off by {error:.1e}")
            continue
        yield Measured(op, launch, rows, timer(call))


def _truth(
    op: str, a: Tensor, gather_index: Tensor, offsets: Tensor, shape: Shape, weights: ExpertWeights
) -> tuple[Tensor, slice]:
    """What the last expert's rows of a product must be, in float64, and where they are."""
    expert = shape.experts - 1
    rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
    if op == "gate_up":
        source = a[gather_index[rows] // shape.top_k].double()
        return weights.activation.apply(source @ weights.up[expert].double().T), rows
    return a[rows].double() @ weights.down[expert].double().T, rows


def _stage_backends(
    launches: Launches, shape: Shape, weights: ExpertWeights, rows: int, timer: Timer
) -> dict[str, str]:
    """For each stage of a layer, the fastest backend that serves this device."""
    from reap_kernels.layer import gpu
    from reap_kernels.stats import LayerStats

    hidden, ids, topk_weights = _inputs(shape, rows, weights)
    stats = LayerStats(shape.experts, 1, hidden.device)
    call = LayerCall(hidden, ids, topk_weights, weights, stats)
    compiled = [] if cuda.refusal(hidden.device) else ["cuda"]
    grouped = [] if grouped_limits(call.request) else ["grouped_mm"]

    def taken(sort: str = "triton", layer: str = "triton", saliency: str = "triton") -> float:
        kernels = gpu.LayerKernels(gpu.PRODUCTS[layer], stage_kernels(sort, saliency), launches)
        return timer(lambda: gpu.observe_layer(kernels, call))

    # StageKernels follow each other without overlap, so each is judged beside the same others.
    others = {"sort": compiled, "layer": grouped, "saliency": compiled}
    return {
        op: min(["triton", *more], key=lambda backend: taken(**{op: backend}))
        for op, more in others.items()
        if more
    }
