"""Stage `short`: calls of 2,048 tokens, in which the host's share is as long as the device's.

Four figures of the same calls: `host_ms`, by the host's clock, calls back to back; `launch_ms`,
until they return while the device is busy with something else; `queued_ms`, between events behind
work that lets the host run ahead, so the device's time alone; `graph_ms`, as a CUDA graph.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.gpu import layer
from bench.gpu.clock import Deadline, behind, busy, times
from bench.gpu.layer import DTYPE, Row
from bench.gpu.machine import Machine
from bench.gpu.providers import PROVIDERS, Prepared, Provider, Work, checked
from bench.gpu.selection import PLANNED, Selection
from bench.gpu.verify import outcome_of
from reap_kernels.testing import Case

ROUNDS, REPEATS = 3, 12
FIGURES = ("host_ms", "launch_ms", "queued_ms", "graph_ms")
RATIO = "queued/transformers"
_SHAPES = ("Qwen3-30B-A3B", "GLM-4.5-Air", "DeepSeek-V3")
_TOKENS = (2048, 512)
_LEFT_OUT = ("products only", "batched_mm", "eager")
_PRINTED = ("shape", "tokens", "provider", "variant", "observed", "status", *FIGURES, "note")


def plan(smoke: bool) -> list[Case]:
    """All lengths of a shape before the next shape."""
    if smoke:
        return layer.plan(smoke)
    shapes = [next(shape for shape in layer.SHAPES if shape.name == name) for name in _SHAPES]
    return [replace(s, tokens=tokens, skew="balanced") for s in shapes for tokens in _TOKENS]


def providers(smoke: bool) -> list[Provider]:
    """Those of the stage `layer` that a short call could be served by; two where all would be
    interpreted.
    """
    some = [provider for provider in PROVIDERS if provider.variant not in _LEFT_OUT]
    return some[-2:] if smoke else some


def run(machine: Machine, deadline: Deadline, selection: Selection = PLANNED) -> list[Row]:
    """Rows of all providers; those the deadline cuts off say so."""
    rows: list[Row] = []
    asked, layers = providers(machine.smoke), layer.Layers(machine)
    rounds = selection.rounds or (1 if machine.smoke else ROUNDS)
    for case in selection.cases(plan(machine.smoke)):
        if deadline.passed():
            rows += [
                _row(case, one, "skipped", deadline.reason) for one in providers(machine.smoke)
            ]
            continue
        rows += layers.measured(case, lambda work: _measured(work, asked, rounds))
    return rows


def _measured(work: Work, asked: Sequence[Provider], rounds: int) -> list[Row]:
    """Rows of one case: every provider in turn."""
    rows = {provider: _row(work.case, provider, "timed", "") for provider in asked}
    timers: dict[Provider, Timer] = {}
    for provider, row in rows.items():
        try:
            prepared = provider.prepare(work)
            row["error"] = f"{checked(work, prepared):.1e}"
            timers[provider] = Timer(work, prepared)
            row["note"] = "; ".join(part for part in (prepared.note, timers[provider].note) if part)
        except Exception as error:  # noqa: BLE001  compilers and peers fail in any way
            wrong = "failed" if provider.name.startswith("reap") else "wrong"
            row["status"], row["note"] = outcome_of(
                error, provider.variant, work.machine.device, wrong
            )
    for _ in range(rounds):
        for timer in timers.values():
            timer.round()
    middle = {provider: timer.medians() for provider, timer in timers.items()}
    theirs = [own["queued_ms"] for p, own in middle.items() if p.name == "transformers"]
    for provider, own in middle.items():
        rows[provider] |= {name: f"{1e3 * seconds:.4g}" for name, seconds in own.items()}
        if theirs:
            rows[provider][RATIO] = f"{own['queued_ms'] / min(theirs):.3f}"
    for row in rows.values():
        print("  ".join(str(row[key]) for key in _PRINTED), flush=True)
    return list(rows.values())


class Timer:
    """One provider's calls, and seconds of each figure.

    Attributes:
        note: why there is no graph, or nothing.
    """

    def __init__(self, work: Work, prepared: Prepared) -> None:
        self._device, self._calls = work.machine.device, prepared.calls
        self._repeats = 1 if work.machine.smoke else REPEATS
        self._taken: dict[str, list[float]] = {}
        self.note = ""
        times(self._calls, self._device, 3)
        self._graph = self._captured()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        if self._device.type != "cuda":
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph):
                self._calls[0]()
        except Exception as error:  # noqa: BLE001  what waits for the device cannot be captured
            self.note = f"no graph: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            return None
        return graph

    def round(self) -> None:
        """Some calls of each kind."""
        self._add("host_ms", [self._host()])
        if self._device.type != "cuda":
            return
        launch, queued = self._behind()
        self._add("launch_ms", [launch])
        self._add("queued_ms", queued)
        if self._graph is not None:
            self._add("graph_ms", times([self._graph.replay], self._device, self._repeats))

    def _add(self, name: str, seconds: list[float]) -> None:
        self._taken.setdefault(name, []).extend(seconds)

    def _some(self) -> None:
        for number in range(self._repeats):
            self._calls[number % len(self._calls)]()

    def _host(self) -> float:
        """Seconds a call takes by the host's clock, with the last one's result there."""
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        self._some()
        if cuda:
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / self._repeats

    def _behind(self) -> tuple[float, list[float]]:
        """Seconds until a call returns, and on the device, both behind other work."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            busy(self._device)
            start = time.perf_counter()
            self._some()
            launch = (time.perf_counter() - start) / self._repeats
        return launch, behind(self._calls, self._device, self._repeats)

    def medians(self) -> dict[str, float]:
        """Of each figure; where there is only the host's clock, `queued_ms` is its."""
        found = {name: statistics.median(taken) for name, taken in self._taken.items()}
        return {"queued_ms": found["host_ms"], **found}


def _row(case: Case, provider: Provider, status: str, note: str) -> Row:
    shape: Row = {"shape": case.name, "E": case.experts, "k": case.top_k, "H": case.hidden}
    what: Row = {"I": case.intermediate, "tokens": case.tokens, "routing": case.skew}
    what |= {"dtype": str(DTYPE).removeprefix("torch."), "provider": provider.name}
    what |= {"variant": provider.variant, "observed": "yes" if provider.observed else "no"}
    blank = dict.fromkeys((*FIGURES, RATIO, "error"), "")
    return {**shape, **what, "status": status, **blank, "note": note}
