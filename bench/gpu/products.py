"""Stage `products`: every kernel of both grouped products side by side, call by call in one run.

Each round calls every provider once, beginning with another one, in one queue, so that clocks and
temperature are the same for all: ratios are of the calls of one round. A provider is compared with
float64 before it is timed. What is not installed, or not in this tree, is a row that says so.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from bench import rows as result_rows
from bench.gpu import layer
from bench.gpu.clock import Deadline, times
from bench.gpu.layer import DTYPE, Row
from bench.gpu.machine import Machine
from bench.gpu.nvml import COLUMNS, Window
from bench.gpu.providers import Work, tma_launch
from bench.gpu.selection import PLANNED, Selection
from bench.gpu.verify import CheckFailed, NotHere, timed_outcome
from reap_kernels.errors import BackendUnavailable
from reap_kernels.experts import gpu as experts
from reap_kernels.experts.operands import Operand
from reap_kernels.experts.product import product as multiplied
from reap_kernels.experts.request import request_of
from reap_kernels.experts.triton_backend import launches
from reap_kernels.sort.gpu import sort_slots
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.testing import Case, relative_error
from reap_kernels.tuning import Launch

PRODUCTS = ("gate_up", "down")
FIRST = "pointer"
OURS = (FIRST, "tma", "wgmma")
RATIO = "time/pointer"
ROUNDS = 40
_SHAPES = ("Qwen3-30B-A3B", "DeepSeek-V3", "Qwen3.5-397B", "Mixtral-8x7B")
_TOKENS = (16384, 2048)
# Rows compared with float64, and the bound: one rounding to bf16 (grouped_mm: two).
_SAMPLE, _BOUND = 32, 8e-3
_FIGURES = ("calls", "ms", "ms_p20", "ms_p80", "tflops", "pct_peak", RATIO, "error", *COLUMNS)
_PRINTED = ("shape", "tokens", "routing", "product", "provider", "status", "ms", RATIO, "note")

Call = Callable[[], Tensor]


def plan(smoke: bool) -> list[Case]:
    """Every layer whose products are timed: long calls of all shapes, short ones, then Zipf's."""
    if smoke:
        return layer.plan(smoke)
    shapes = [next(shape for shape in layer.SHAPES if shape.name == name) for name in _SHAPES]
    kinds = [(tokens, "balanced") for tokens in _TOKENS] + [(_TOKENS[0], "zipf")]
    return [replace(s, tokens=tokens, skew=skew) for tokens, skew in kinds for s in shapes]


@dataclass(frozen=True)
class Bed:
    """What both products of a layer multiply.

    Attributes:
        work: the layer.
        rows: its sorted slots.
        inner: h [S, I] by sorted row, that the second product reads; bf16.
    """

    work: Work
    rows: SortedSlots
    inner: Tensor

    @classmethod
    def of(cls, work: Work) -> "Bed":
        """Sorts the slots, and draws h."""
        slots = sort_slots(work.ids, work.router_weights.contiguous(), work.case.experts)
        size = (work.slots, work.case.intermediate)
        rng = torch.Generator(work.machine.device).manual_seed(3)
        inner = torch.randn(size, generator=rng, device=work.machine.device, dtype=DTYPE)
        return cls(work, slots, inner)

    def launch(self, product: str) -> Launch:
        """Tiles that the launch table has for the layer's request."""
        work = self.work
        both = launches(request_of("layer", work.hidden[0], work.case.top_k, work.experts))
        return both.up if product == "gate_up" else both.down

    def want(self, product: str) -> tuple[Tensor, Tensor]:
        """Some sorted rows, and what they are in float64."""
        work, slots = self.work, self.work.slots
        at = torch.linspace(0, slots - 1, min(_SAMPLE, slots)).long().to(work.machine.device)
        owner = torch.searchsorted(self.rows.offsets, at, right=True) - 1
        if product == "down":
            given, matrices = self.inner[at].double(), work.experts.down
            return at, torch.stack(
                [matrices[e].double() @ x for e, x in zip(owner.tolist(), given, strict=True)]
            )
        given = work.hidden[0][self.rows.gather_index[at] // self.rows.top_k].double()
        both = torch.stack(
            [work.experts.up[e].double() @ x for e, x in zip(owner.tolist(), given, strict=True)]
        )
        gate, up = both.chunk(2, dim=-1)
        return at, torch.nn.functional.silu(gate) * up


def _triton(bed: Bed, product: str, launch: Launch) -> Call:
    work = bed.work
    if product == "gate_up":
        return lambda: experts.triton_inner(work.hidden[0], bed.rows, work.experts, launch)
    down = Operand.of(work.experts.down, None)
    return lambda: multiplied(bed.inner, down, bed.rows, launch)


def _pointer(bed: Bed, product: str) -> tuple[Call, str]:
    launch = replace(bed.launch(product), kernel="pointer")
    return _triton(bed, product, launch), str(launch)


def _tma(bed: Bed, product: str) -> tuple[Call, str]:
    launch = tma_launch(bed.work.machine.device, product, bed.launch(product))
    return _triton(bed, product, launch), str(launch)


def _wgmma(bed: Bed, product: str) -> tuple[Call, str]:
    from reap_kernels.experts import kernel_cuda

    own, hidden = bed.work.experts, bed.work.hidden[0]
    up, gate = kernel_cuda.first_halves(own)
    if product == "down":
        up, gate = kernel_cuda.Half.of(own.down, None), None
    reason = kernel_cuda.refusal(hidden.device, up, gate)
    if reason is not None:
        raise BackendUnavailable(reason)
    if product == "down":
        return lambda: kernel_cuda.product(bed.inner, up, bed.rows), ""
    first = {"gate": gate, "activation": own.activation, "gather": True}
    return lambda: kernel_cuda.product(hidden, up, bed.rows, **first), ""


def _grouped_mm(bed: Bed, product: str) -> tuple[Call, str]:
    multiply = getattr(torch.nn.functional, "grouped_mm", None)
    if multiply is None:
        raise NotHere(f"torch {torch.__version__} has no grouped_mm")
    own, hidden, rows = bed.work.experts, bed.work.hidden[0], bed.rows
    ends = rows.offsets[1:].to(torch.int32)
    if product == "down":
        down = own.down.transpose(1, 2)
        return lambda: multiply(bed.inner, down, offs=ends), ""
    both = own.up.transpose(1, 2)

    def call() -> Tensor:
        gathered = hidden.index_select(0, rows.gather_index // rows.top_k)
        gate, up = multiply(gathered, both, offs=ends).chunk(2, dim=-1)
        return experts.activated(up, gate, own.activation, rows)

    return call, "with a gather and an activation pass"


def _deep_gemm(bed: Bed, product: str) -> tuple[Call, str]:
    if find_spec("deep_gemm") is None:
        raise NotHere("deep_gemm is not installed")
    import deep_gemm

    own, rows = bed.work.experts, bed.rows
    # Its rows of an expert begin at multiples of a tile; those between are padding.
    step = int(deep_gemm.get_mk_alignment_for_contiguous_layout())
    sizes = rows.offsets.diff()
    starts = ((sizes + step - 1) // step * step).cumsum(0)
    total, starts = int(starts[-1]), starts - (sizes + step - 1) // step * step
    owner = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    place = starts[owner] + torch.arange(len(owner), device=owner.device) - rows.offsets[owner]
    ends = torch.cat([starts[1:], starts.new_tensor([total])])
    index = torch.arange(len(sizes), device=sizes.device).repeat_interleave(ends - starts).int()
    matrices = own.down if product == "down" else own.up
    given = bed.inner
    if product == "gate_up":
        given = bed.work.hidden[0].index_select(0, rows.gather_index // rows.top_k)
    padded = torch.zeros(total, given.shape[1], dtype=DTYPE, device=given.device)
    padded[place] = given
    out = torch.empty(total, matrices.shape[1], dtype=DTYPE, device=given.device)

    def call() -> Tensor:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(padded, matrices, out, index)
        return out

    def outputs() -> Tensor:
        y = call()[place]
        gate, up = (y, y) if product == "down" else y.float().chunk(2, dim=-1)
        return y if product == "down" else torch.nn.functional.silu(gate) * up

    call.outputs = outputs  # type: ignore[attr-defined]
    note = f"the product alone, of rows that were gathered and padded to {step} beforehand"
    return call, f"{note}, {result_rows.version('deep_gemm')}"


PROVIDERS: dict[str, Callable[[Bed, str], tuple[Call, str]]] = {
    FIRST: _pointer,
    "tma": _tma,
    "wgmma": _wgmma,
    "torch grouped_mm": _grouped_mm,
    "DeepGEMM": _deep_gemm,
}


def run(machine: Machine, deadline: Deadline, selection: Selection = PLANNED) -> list[Row]:
    """Rows of all providers; those the deadline cuts off say so."""
    found: list[Row] = []
    layers = layer.Layers(machine)
    rounds = selection.rounds or (1 if machine.smoke else ROUNDS)

    def both(work: Work) -> list[Row]:
        bed = Bed.of(work)
        return [row for product in PRODUCTS for row in measure(bed, product, rounds)]

    for case in selection.cases(plan(machine.smoke)):
        if deadline.passed():
            found += [_row(case, product, "", "skipped", deadline.reason) for product in PRODUCTS]
            continue
        found += layers.measured(case, both)
    return found


def measure(bed: Bed, product: str, rounds: int) -> list[Row]:
    """Rows of one product by every provider."""
    ready: dict[str, Call] = {}
    found: dict[str, Row] = {}
    for name, prepare in PROVIDERS.items():
        row = found[name] = _row(bed.work.case, product, name, "timed", "")
        try:
            call, row["note"] = prepare(bed, product)
            row["error"] = f"{_checked(bed, product, call):.1e}"
            ready[name] = call
        except Exception as error:  # noqa: BLE001  compilers and peers fail in any way
            # What is wrong with ours ends the run in red; with others it is said and not timed.
            wrong = "failed" if name in OURS else "wrong"
            row["status"], row["note"] = timed_outcome(error, name, bed.work.machine.device, wrong)
    if ready:
        _time(bed, product, ready, found, rounds)
    for row in found.values():
        print("  ".join(str(row[key]) for key in _PRINTED), flush=True)
    return list(found.values())


def _checked(bed: Bed, product: str, call: Call) -> float:
    """The error of some rows."""
    at, want = bed.want(product)
    error = relative_error(getattr(call, "outputs", call)()[at], want)
    if not error <= _BOUND:
        raise CheckFailed(f"rows are off by {error:.1e}, {_BOUND:.0e} is allowed")
    return error


def _time(
    bed: Bed, product: str, ready: dict[str, Call], found: dict[str, Row], rounds: int
) -> None:
    """Fills in figures: each round begins with another provider."""
    machine, names = bed.work.machine, list(ready)
    order = [names[(at + turn) % len(names)] for turn in range(rounds) for at in range(len(names))]
    windows: list[Window] = []
    calls = [ready[name] for name in order]
    times(calls, machine.device, 2 * len(names))
    with machine.watch.window(windows):
        seconds = times(calls, machine.device, len(calls))
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name, one in zip(order, seconds, strict=True):
        taken[name].append(one)
    one = 2 * bed.work.slots * bed.work.case.hidden * bed.work.case.intermediate
    flops = one * (2 if product == "gate_up" else 1)
    for name, own in taken.items():
        ordered, middle = sorted(own), statistics.median(own)
        edge = int(0.2 * (len(ordered) - 1))
        ratios = [a / b for a, b in zip(own, taken.get(FIRST, own), strict=True)]
        found[name] |= {
            "calls": len(own),
            "ms": f"{middle * 1e3:.4g}",
            "ms_p20": f"{ordered[edge] * 1e3:.4g}",
            "ms_p80": f"{ordered[-1 - edge] * 1e3:.4g}",
            "tflops": f"{flops / middle / 1e12:.4g}",
            "pct_peak": f"{100 * flops / middle / machine.peak:.1f}",
            RATIO: f"{statistics.median(ratios):.4f}" if FIRST in taken else "",
            **machine.watch.columns(windows),
        }


def _row(case: Case, product: str, provider: str, status: str, note: str) -> Row:
    shape: Row = {"shape": case.name, "E": case.experts, "k": case.top_k, "H": case.hidden}
    what: Row = {"I": case.intermediate, "tokens": case.tokens, "routing": case.skew}
    what |= {"dtype": str(DTYPE).removeprefix("torch."), "product": product, "provider": provider}
    return {**shape, **what, "status": status, **dict.fromkeys(_FIGURES, ""), "note": note}
