"""Layers of FP8 experts, in turn: products that read codes, and products of dequantized weights.

Codes and scales are random; both ways are checked against float64 before they are timed.
"""

from collections.abc import Callable

import torch

from bench.gpu import layer
from bench.gpu.clock import Deadline
from bench.gpu.lines import in_force
from bench.gpu.machine import Machine
from bench.gpu.providers import Prepared, Provider, Work, of_run
from bench.gpu.selection import Selection
from bench.gpu.verify import NotHere
from reap_kernels import Activation, ExpertWeights, Quantized
from reap_kernels.experts.request import request_of
from reap_kernels.experts.triton_backend import code_limits, note
from reap_kernels.layer import triton_backend
from reap_kernels.testing import Case
from reap_kernels.tuning import Entry

Row = dict[str, object]
# Published in blocks of FP8.
_SHAPES = ("Qwen3-30B-A3B", "DeepSeek-V3")
_TOKENS = (16384, 2048)
_BLOCK = 128
_CODES = 64.0  # standard deviation of what is rounded to codes, which end at 448
# bf16 rounds h and the output; the truth is of dequantized weights, which bf16 has rounded too.
_BOUND = 8e-3


def plan(smoke: bool) -> list[Case]:
    """Layer calls, routed evenly."""
    known = [case for case in layer.plan(smoke) if case.skew == "balanced"]
    if smoke:
        return known
    return [case for case in known if case.name in _SHAPES and case.tokens in _TOKENS]


def codes(case: Case, device: torch.device) -> ExpertWeights:
    """Experts of a shape as E4M3 codes, scaled so that outputs are of order 1."""
    e, h, i = case.experts, case.hidden, case.intermediate
    rng = torch.Generator(device).manual_seed(0)

    def made(rows: int, columns: int, std: float) -> Quantized:
        values = torch.empty(e, rows, columns, dtype=torch.float8_e4m3fn, device=device)
        room = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        for own in values:
            own.copy_(room.normal_(std=_CODES, generator=rng))
        blocks = (e, -(-rows // _BLOCK), -(-columns // _BLOCK))
        scales = torch.rand(blocks, device=device, generator=rng) + 0.5
        return Quantized(values, scales * (std / _CODES), "fp8_block", (_BLOCK, _BLOCK))

    up, down = made(2 * i, h, h**-0.5), made(h, i, 2 * i**-0.5)
    return ExpertWeights(up, down, Activation("silu"))


def _by(backend: str) -> Callable[[Work], Prepared]:
    """Triton's layer with a line of the launch table that says how codes are read."""

    def prepare(work: Work) -> Prepared:
        request = request_of("layer", work.hidden[0], work.case.top_k, work.experts)
        reason = code_limits(request)
        if reason is not None:
            raise NotHere(reason)
        line = Entry("quantized", "half", None, None, backend=backend)
        with in_force(work.machine.device, [line]):
            own, told = triton_backend.prepare("triton", request), note(request)
        return of_run(work, own, _BOUND, told)

    return prepare


PROVIDERS = (
    Provider("reap", "FP8 dequantized", True, _by("dequantize")),
    Provider("reap", "FP8 codes", True, _by("product")),
)


def run(machine: Machine, deadline: Deadline, selection: Selection) -> list[Row]:
    """Rows of all calls, as the stage `layer` has them."""
    rounds = selection.rounds or layer.ROUNDS
    cases = selection.cases(plan(machine.smoke))
    return layer.run(machine, cases, deadline, PROVIDERS, rounds, codes)
