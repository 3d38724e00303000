"""Stage 3, one layer: the seven shapes by three lengths by two routings, every provider in turn."""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bench.gpu.clock import Deadline, times
from bench.gpu.machine import Machine
from bench.gpu.nvml import COLUMNS, Window
from bench.gpu.providers import PROVIDERS, Prepared, Provider, Work, checked
from bench.gpu.verify import timed_outcome
from reap_kernels import Activation, ExpertWeights
from reap_kernels.testing import Case

Row = dict[str, object]
# The experts of a shape, on a device.
Maker = Callable[[Case, torch.device], ExpertWeights]
DTYPE = torch.bfloat16
ROUNDS = 2
_SLOW, _VERY_SLOW = 0.05, 0.5  # seconds per call from which on fewer calls are timed


def _shape(name: str, experts: int, top_k: int, hidden: int, intermediate: int) -> Case:
    return Case(name, "timed", 0, experts, top_k, hidden, intermediate)


# The most important first: what the budget does not reach is skipped.
SHAPES = (
    _shape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    _shape("DeepSeek-V3", 256, 8, 7168, 2048),
    _shape("Mixtral-8x7B", 8, 2, 4096, 14336),
    _shape("Qwen3-Coder-480B", 160, 8, 6144, 2560),
    _shape("GLM-4.5-Air", 128, 8, 4096, 1408),
    _shape("Qwen3.5-397B", 512, 10, 4096, 1024),
    _shape("gpt-oss-120b in bf16", 128, 4, 2880, 2880),
)
TOKENS = (16384, 2048, 65536)
_SMOKE = _shape("tiny", 2, 2, 32, 32)


def plan(smoke: bool) -> list[Case]:
    """Every layer call: balanced routing before Zipf's, a length of all shapes before the next."""
    shapes, lengths = ((_SMOKE,), (8,)) if smoke else (SHAPES, TOKENS)
    return [
        replace(shape, tokens=tokens, skew=skew)
        for skew in (("balanced",) if smoke else ("balanced", "zipf"))
        for tokens in lengths
        for shape in shapes
    ]


def weights(case: Case, device: torch.device) -> ExpertWeights:
    """N(0, 1) experts of a shape made on the device, scaled so that outputs are of order 1."""
    e, h, i = case.experts, case.hidden, case.intermediate
    rng = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float) -> torch.Tensor:
        room = torch.empty(*shape, dtype=DTYPE, device=device)
        return room.normal_(std=std, generator=rng)

    up, down = normal(e, 2 * i, h, std=h**-0.5), normal(e, h, i, std=2 * i**-0.5)
    return ExpertWeights(up, down, Activation("silu"))


def run(
    machine: Machine,
    cases: list[Case],
    deadline: Deadline,
    providers: Sequence[Provider] | None = None,
    rounds: int = ROUNDS,
    make: Maker = weights,
) -> list[Row]:
    """Rows of all cases by all providers, `PROVIDERS` by default, on weights that `make` makes;
    those the deadline cuts off say so.
    """
    providers = PROVIDERS if providers is None else providers
    rows: list[Row] = []
    layers = Layers(machine, make)
    for case in cases:
        if deadline.passed():
            rows += [_row(case, p, status="skipped", note=deadline.reason) for p in providers]
            continue
        rows += layers.measured(case, lambda work: measure(work, deadline, providers, rounds))
    return rows


class Layers:
    """Makes layers to measure; calls of one shape after another share its weights."""

    def __init__(self, machine: Machine, make: Maker = weights) -> None:
        self._machine, self._make = machine, make
        self._experts: ExpertWeights | None = None
        self._shape: Case | None = None

    def measured(self, case: Case, measure: Callable[[Work], list[Row]]) -> list[Row]:
        """Rows of one call, of a layer that lives no longer."""
        shape = replace(case, tokens=0, skew="")
        if shape != self._shape or self._experts is None:
            self._experts = None  # freed before the next shape's are made
            release(self._machine)
            self._experts, self._shape = self._make(case, self._machine.device), shape
        with torch.no_grad():
            rows = measure(Work(self._machine, case, self._experts))
        release(self._machine)
        return rows


def release(machine: Machine) -> None:
    """Gives memory that nothing refers to back to the device."""
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    work: Work, deadline: Deadline, providers: Sequence[Provider], rounds: int = ROUNDS
) -> list[Row]:
    """Rows of one case: every provider, `rounds` times in turn."""
    rows = {provider: _row(work.case, provider) for provider in providers}
    taken: dict[Provider, list[float]] = {provider: [] for provider in providers}
    windows: dict[Provider, list[Window]] = {provider: [] for provider in providers}
    for turn in range(rounds):
        for provider, row in rows.items():
            if row["status"] not in ("", "timed"):  # refused, skipped, failed or wrong
                continue
            if deadline.passed():
                row["note"] = f"{row['note']}; round {turn + 1} skipped: {deadline.reason}"
                row["status"] = row["status"] or "skipped"
                continue
            own = (taken[provider], windows[provider])
            _attempt(work, provider, row, *own, verify=turn == 0)
            if row["status"] != "timed":
                taken[provider].clear()
                release(work.machine)
    for provider, row in rows.items():
        if row["status"] == "timed":
            row.update(_figures(work, taken[provider]))
            row.update(work.machine.watch.columns(windows[provider]))
    _ratios(
        rows, {p: statistics.median(t) for p, t in taken.items() if rows[p]["status"] == "timed"}
    )
    for row in rows.values():
        print("  ".join(str(row[k]) for k in _PRINTED), flush=True)
    return list(rows.values())


def _attempt(
    work: Work,
    provider: Provider,
    row: Row,
    taken: list[float],
    windows: list[Window],
    verify: bool,
) -> None:
    """One round of one provider; checked first, and never timed where the check fails."""
    device = work.machine.device
    try:
        prepared = provider.prepare(work)
        if verify:
            row["error"] = f"{checked(work, prepared):.1e}"
            row["note"] = prepared.note
        repeats = _repeats(work, prepared)
        with work.machine.watch.window(windows):
            own = times(prepared.calls, device, repeats)
        taken += [prepared.scale * seconds for seconds in own]
        row["status"] = "timed"
    except Exception as error:  # noqa: BLE001  compilers and peers fail in any way
        # What is wrong with ours ends the run in red; with others it is said and not timed.
        wrong = "failed" if provider.name.startswith("reap") else "wrong"
        status, note = timed_outcome(error, provider.variant, device, wrong)
        row.update(status=status, note=note)


def _repeats(work: Work, prepared: Prepared) -> int:
    """Calls to time in one round, after warming up: fewer of slow ones."""
    if work.machine.smoke:
        return 1
    # The first call compiles what `verify` did not run.
    trial = times(prepared.calls, work.machine.device, 3)[-1]
    return 15 if trial < _SLOW else 3 if trial < _VERY_SLOW else 1


def _row(case: Case, provider: Provider, status: str = "", note: str = "") -> Row:
    """A row before its figures."""
    shape: Row = {"shape": case.name, "E": case.experts, "k": case.top_k, "H": case.hidden}
    what: Row = {"I": case.intermediate, "tokens": case.tokens, "routing": case.skew}
    who: Row = {"provider": provider.name, "variant": provider.variant}
    head = {**shape, **what, "dtype": str(DTYPE).removeprefix("torch."), **who}
    observed = "yes" if provider.observed else "no"
    return {
        **head,
        "observed": observed,
        "status": status,
        **dict.fromkeys(_FIGURES, ""),
        "note": note,
    }


_FIGURES = (
    "calls",
    "ms",
    "ms_p20",
    "ms_p80",
    "tflops",
    "pct_peak",
    "gb_s",
    "pct_copy",
    "observed/unobserved",
    "transformers/observed",
    "error",
    *COLUMNS,
)
_PRINTED = ("shape", "tokens", "routing", "provider", "variant", "observed", "status", "ms", "note")


def _figures(work: Work, taken: list[float]) -> Row:
    """Median time, and what it means: useful work and compulsory bytes, whatever was done."""
    case, machine = work.case, work.machine
    seconds = statistics.median(taken)
    ordered = sorted(taken)
    size = DTYPE.itemsize
    flops = 6 * work.slots * case.hidden * case.intermediate
    read = work.touched * 3 * case.hidden * case.intermediate * work.weight_size
    routing = work.ids.nbytes + work.router_weights.nbytes
    moved = read + 2 * case.tokens * case.hidden * size + routing
    return {
        "calls": len(taken),
        "ms": f"{seconds * 1e3:.4g}",
        "ms_p20": f"{ordered[int(0.2 * (len(ordered) - 1))] * 1e3:.4g}",
        "ms_p80": f"{ordered[-1 - int(0.2 * (len(ordered) - 1))] * 1e3:.4g}",
        "tflops": f"{flops / seconds / 1e12:.4g}",
        "pct_peak": f"{100 * flops / seconds / machine.peak:.1f}",
        "gb_s": f"{moved / seconds / 1e9:.4g}",
        "pct_copy": f"{100 * moved / seconds / machine.copy:.1f}",
    }


def _ratios(rows: dict[Provider, Row], middle: dict[Provider, float]) -> None:
    """Observed over unobserved of one backend, and transformers' fastest over our observed."""
    plain = {p.variant: t for p, t in middle.items() if p.name == "reap" and not p.observed}
    theirs = [t for p, t in middle.items() if p.name == "transformers"]
    for provider, seconds in middle.items():
        if provider.name == "reap" and provider.observed:
            if provider.variant in plain:
                ratio = f"{seconds / plain[provider.variant]:.4f}"
                rows[provider]["observed/unobserved"] = ratio
            if theirs:
                rows[provider]["transformers/observed"] = f"{min(theirs) / seconds:.3f}"
