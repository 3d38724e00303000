"""Stage 2, single kernels: parts of a layer around its products, and dequantization.

Kernels of a few microseconds take less than the host needs to launch them, so each part is timed as
a CUDA graph of all its calls (`us`); `us_queued` is what a caller sees who launches one by one.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.gpu.clock import Deadline, times
from bench.gpu.layer import SHAPES, TOKENS, release
from bench.gpu.logits import NAME as COMPARE
from bench.gpu.logits import of_vocabulary
from bench.gpu.machine import Machine
from bench.gpu.norms import ADDED, NORM, ROTARY, of_norms
from bench.gpu.parts import (
    AROUND,
    DTYPE,
    OBSERVED,
    UNOBSERVED,
    Bed,
    Part,
    Prepared,
    of_formats,
    of_layer,
)
from bench.gpu.selection import PLANNED, Selection
from bench.gpu.verify import timed_outcome
from reap_kernels.testing import Case

Row = dict[str, object]
BACKENDS, DEQUANT_BACKENDS = ("triton", "cuda"), ("reference", "cuda")
ROUNDS, REPEATS = 2, 15
# What the design asks of the CUDA kernels; bench/gpu/report.py states it beside the figures.
GOALS = {
    OBSERVED: "80 % of copy bandwidth",
    AROUND: "40 us at T = 16384, k = 8",
    "dequantize": "80 % of copy bandwidth",
}
_CHUNK = 16  # experts dequantized at a time
_SMOKE = Case("tiny", "timed", 16, 4, 2, 64, 32)


def _matrix(name: str, rows: int, columns: int, experts: int = _CHUNK) -> Case:
    return Case(name, "timed", 0, experts, 0, columns, rows)


QUANTIZED = (
    (_matrix("DeepSeek-V3, gate and up", 4096, 7168), "fp8_block"),
    (_matrix("DeepSeek-V3, down", 7168, 2048), "fp8_block"),
    (_matrix("gpt-oss-120b, gate and up", 5760, 2880), "mxfp4"),
    (_matrix("gpt-oss-120b, down", 2880, 2880), "mxfp4"),
    (_matrix("Kimi-K2, gate and up", 4096, 7168), "int4_group"),
    (_matrix("Kimi-K2, down", 7168, 2048), "int4_group"),
)


def plan(smoke: bool) -> list[Case]:
    """Shapes and lengths of the parts of a layer, the most important first."""
    if smoke:
        return [_SMOKE]
    return [replace(shape, tokens=tokens) for shape in SHAPES for tokens in TOKENS]


def quantized(smoke: bool) -> list[tuple[Case, str]]:
    """Matrices and formats to dequantize."""
    if smoke:
        return [(_matrix("tiny", 64, 96, experts=2), format) for _, format in QUANTIZED[::2]]
    return list(QUANTIZED)


def run(machine: Machine, deadline: Deadline, selection: Selection = PLANNED) -> list[Row]:
    """Rows of all parts; those the deadline cuts off say so."""
    rows: list[Row] = []
    with torch.no_grad():
        for group in _groups(machine, selection.cases(plan(machine.smoke))):
            rows += measure(group, machine, deadline, selection.rounds or ROUNDS)
            del group
            release(machine)
    return rows


def _groups(machine: Machine, cases: list[Case]) -> Iterator[list[Part]]:
    """Parts that are timed in turn: of the first shape and length, of quantized matrices, of
    logits, of norms, then of the other shapes.
    """
    for number, case in enumerate(cases):
        yield of_layer(Bed(machine, case), BACKENDS)
        if number == 0:
            for shape in quantized(machine.smoke):
                yield of_formats(machine, [shape], DEQUANT_BACKENDS)
            yield of_vocabulary(machine)
            yield of_norms(machine)


def measure(
    parts: list[Part], machine: Machine, deadline: Deadline, rounds: int = ROUNDS
) -> list[Row]:
    """Rows of parts that are timed in turn, `rounds` times."""
    pairs = [(part, _row(part)) for part in parts]
    timers: list[Timer | None] = [None] * len(parts)
    for turn in range(rounds):
        for number, (part, row) in enumerate(pairs):
            if row["status"] not in ("", "timed"):
                continue
            if deadline.passed():
                row["note"] = f"round {turn + 1} skipped: {deadline.reason}"
                row["status"] = row["status"] or "skipped"
                continue
            timers[number] = _attempt(part, row, timers[number], machine)
    for (_, row), timer in zip(pairs, timers, strict=True):
        if timer is not None and row["status"] == "timed":
            row.update(timer.figures())
    _ratios(pairs)
    for _, row in pairs:
        print("  ".join(str(row[key]) for key in _PRINTED), flush=True)
    return [row for _, row in pairs]


class Timer:
    """Calls of one part, and the seconds they took.

    Attributes:
        prepared: the part, checked.
        taken: seconds per call on the device.
        queued: seconds per call, launched one by one.
    """

    def __init__(self, prepared: Prepared, machine: Machine) -> None:
        self.prepared, self.machine = prepared, machine
        self.taken: list[float] = []
        self.queued: list[float] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        if machine.device.type == "cuda" and prepared.captured:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(machine.device), torch.cuda.graph(self._graph):
                for call in prepared.calls:
                    call()
            times([self._graph.replay], machine.device, 2)

    def round(self) -> None:
        """One round of timings."""
        device, calls = self.machine.device, self.prepared.calls
        repeats = 1 if self.machine.smoke else REPEATS
        own = times(calls, device, repeats)
        self.queued += own
        if self._graph is not None:
            own = times([self._graph.replay], device, repeats)
            own = [seconds / len(calls) for seconds in own]
        self.taken += own

    def figures(self) -> Row:
        """Medians, and compulsory bytes as a share of what a copy reaches."""
        ordered, moved = sorted(self.taken), self.prepared.moved
        seconds = statistics.median(ordered)
        edge = int(0.2 * (len(ordered) - 1))
        return {
            "calls": len(ordered),
            "us": f"{seconds * 1e6:.4g}",
            "us_p20": f"{ordered[edge] * 1e6:.4g}",
            "us_p80": f"{ordered[-1 - edge] * 1e6:.4g}",
            "us_queued": f"{statistics.median(self.queued) * 1e6:.4g}",
            "gb_s": f"{moved / seconds / 1e9:.4g}",
            "pct_copy": f"{100 * moved / seconds / self.machine.copy:.1f}",
        }


def _attempt(part: Part, row: Row, timer: Timer | None, machine: Machine) -> Timer | None:
    """One round of one part; checked first, and never timed where the check fails."""
    try:
        if timer is None:
            prepared = part.prepare()
            row["error"] = f"{prepared.verify():.1e}"
            timer = Timer(prepared, machine)
        timer.round()
        row["status"] = "timed"
    except Exception as error:  # noqa: BLE001  whatever a kernel or a compiler does is red
        status, note = timed_outcome(error, part.variant, machine.device)
        row.update(status=status, note=note)
    return timer


_FIGURES = ("calls", "us", "us_p20", "us_p80", "us_queued", "gb_s", "pct_copy")
_RATIOS = ("observed/unobserved", "ours/other")
_PRINTED = ("shape", "tokens", "kernel", "variant", "status", "us", "pct_copy", "note")


def _row(part: Part) -> Row:
    """A row before its figures."""
    case = part.case
    shape: Row = {"shape": case.name, "E": case.experts, "k": case.top_k, "H": case.hidden}
    what: Row = {"I": case.intermediate, "tokens": case.tokens, "kernel": part.name}
    who: Row = {"variant": part.variant, "dtype": str(DTYPE).removeprefix("torch."), "status": ""}
    return {**shape, **what, **who, **dict.fromkeys((*_FIGURES, *_RATIOS, "error", "note"), "")}


def _ratios(pairs: list[tuple[Part, Row]]) -> None:
    """What norms add to the combination, and a kernel's time over what it replaces."""
    timed = {(p.name, p.variant): row for p, row in pairs if row["status"] == "timed"}
    for (name, variant), row in timed.items():
        plain = timed.get((UNOBSERVED, variant))
        if name == OBSERVED and plain:
            row["observed/unobserved"] = _over(row, plain)
        others = [own for (n, v), own in timed.items() if n == name and v != variant]
        beside_torch = variant == "triton" and name in (COMPARE, NORM, ADDED, ROTARY)
        if others and (variant == "cuda" or beside_torch):
            row["ours/other"] = _over(row, others[0])


def _over(row: Row, other: Row) -> str:
    return f"{float(str(row['us'])) / float(str(other['us'])):.3f}"
