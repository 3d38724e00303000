"""Correctness on a GPU: cases, layouts, activations and dtypes against float64.

A check is a function that returns what it found, or raises. `tests.gpu.test_gpu` runs each as a
test, `python -m bench.gpu` all of them before it times anything.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.verify import (
    MANY_ROWS,
    STAGES,
    CheckFailed,
    bounds_of,
    differences,
    products_of,
)
from reap_kernels import LayerStats, quantized
from reap_kernels.dispatch import backends
from reap_kernels.stats import FIELDS
from reap_kernels.testing import (
    ACTIVATIONS,
    CASES,
    LAYOUTS,
    Case,
    Inputs,
    make_experts,
    make_inputs,
    make_quantized,
    make_quantized_experts,
    relative_error,
)
from reap_kernels.types import ExpertWeights

BACKENDS = ("triton", "grouped_mm", "cuda")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True)
class Check:
    """One check: `run(device, *arguments)` returns what it found."""

    name: str
    backend: str
    dtype: torch.dtype
    run: Callable[..., str]
    arguments: tuple[object, ...]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` yields NaN (integers: their maximum), so a value nobody wrote shows.

    `warn_only`, since cuBLAS is deterministic on one stream and torch cannot know there is one.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


def observe(
    inputs: Inputs,
    experts: ExpertWeights,
    backend: str,
    groups: int = 1,
    chunk: int | None = None,
    observed: bool = True,
    **options: Any,
) -> tuple[Tensor, LayerStats | None]:
    """Output and statistics of one call; `options` are further ones of the op."""
    stats = LayerStats(experts.num_experts, groups, inputs.hidden.device) if observed else None
    out = rk.observe_layer(
        inputs.hidden,
        inputs.topk_ids,
        inputs.topk_weights,
        experts,
        stats,
        mask=inputs.mask,
        group=inputs.group,
        chunk=chunk,
        backend=backend,
        **options,
    )
    return out, stats


def same_bits(first: LayerStats | None, second: LayerStats | None) -> list[str]:
    """Fields whose bits differ."""
    assert first is not None
    assert second is not None
    pairs = ((name, first.fields()[name], second.fields()[name]) for name in FIELDS)
    return [f"{name} has other bits the second time" for name, a, b in pairs if not a.equal(b)]


def compare(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    case: Case,
    layout: str = "stacked",
    activation: rk.Activation | None = None,
    fewest_rows: int = 0,
) -> str:
    """One call against the float64 reference on the same inputs, then again for the same bits.

    `layout` may be a format of quantized experts, which are bf16 once they are dequantized.
    """
    inputs = make_inputs(case, dtype, device=device)
    if layout in quantized.FORMATS:
        experts = make_quantized_experts(case, layout, activation=activation, device=device)
    else:
        experts = make_experts(case, layout, activation, dtype, device=device)
    with poisoned():
        out, stats = observe(inputs, experts, backend, case.groups)
        again, twice = observe(inputs, experts, backend, case.groups)
        plain, _ = observe(inputs, experts, backend, observed=False)
    want_out, want = observe(inputs, experts, "reference", case.groups)
    assert stats is not None
    assert want is not None
    if fewest_rows and int(want.count.min()) < fewest_rows:
        raise CheckFailed(f"the case gives an expert {int(want.count.min())} rows only")
    products = products_of(backend, inputs.hidden, case.top_k, experts)
    bounds = bounds_of(dtype, products, fewest_rows)
    found, saliency = differences(stats, want, bounds)
    error = relative_error(out, want_out)
    if not error <= bounds.output:
        found.append(f"the output is off by {error:.1e}, {bounds.output:.0e} is allowed")
    if not (torch.equal(out, again) and torch.equal(out, plain)):
        found.append("the output has other bits the second time, or without statistics")
    found += same_bits(stats, twice)
    if found:
        raise CheckFailed("; ".join(found))
    return f"output {error:.1e}, weighted_norm_sum {saliency:.1e}"


def single_ops(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """route, accumulate, and where the backend has products expert_outputs, on their own."""
    inputs = make_inputs(case, dtype, device=device)
    ids, weights = inputs.topk_ids, inputs.topk_weights
    y = torch.randn(ids.numel(), case.hidden, dtype=dtype, device=device)
    every = {"mask": inputs.mask, "group": inputs.group}
    rows = {k: v.repeat_interleave(case.top_k) for k, v in every.items() if isinstance(v, Tensor)}
    got, want = (LayerStats(case.experts, case.groups, device) for _ in range(2))
    found = []
    with poisoned():
        routing = rk.sort_by_expert(ids, case.experts, topk_weights=weights, backend=backend)
        rk.accumulate(y, ids.flatten(), weights.flatten(), got, **rows, backend=backend)
    truth = rk.sort_by_expert(ids, case.experts, topk_weights=weights, backend="reference")
    own = backend in backends("experts")
    if not (
        torch.equal(routing.gather_index, truth.gather_index)
        and truth.offsets.equal(routing.offsets)
    ):
        found.append("sort differs")
    elif own:
        experts = make_experts(case, dtype=dtype, device=device)
        with poisoned():
            outputs = rk.expert_outputs(inputs.hidden, routing, experts, backend=backend)
        wanted = rk.expert_outputs(inputs.hidden, truth, experts, backend="reference")
        error = relative_error(outputs, wanted)
        if not error <= bounds_of(dtype, backend).output:
            found.append(f"expert_outputs is off by {error:.1e}")
    rk.accumulate(y, ids.flatten(), weights.flatten(), want, **rows, backend="reference")
    # Norms of given rows accumulate in float32, whatever the rows' dtype.
    found += differences(got, want, bounds_of(torch.float32, backend))[0]
    if found:
        raise CheckFailed("; ".join(found))
    return f"sort equal, {'outputs and ' if own else ''}sums within bounds"


def dequantized(device: torch.device, backend: str, dtype: torch.dtype, format: str) -> str:
    """Quantized matrices against the reference's on the CPU, bit by bit, for every dtype of scales;
    experts without rows stay as they were.
    """
    for scales in quantized.FORMATS[format][2]:
        made = make_quantized(format, 5, 192, 416, scales=scales)
        offsets = torch.tensor([0, 3, 3, 4, 4, 9])
        want = rk.dequantize(made, backend="reference")
        want[1] = want[3] = 7
        got = torch.full_like(want, 7).to(device)
        rk.dequantize(made.to(device), offsets=offsets.to(device), out=got, backend=backend)
        if not torch.equal(got.cpu().view(torch.int16), want.view(torch.int16)):
            raise CheckFailed(f"{format} with scales {scales} gives other bits, {dtype}")
    return "the reference's bits, skipped experts untouched"


LARGE = Case("large", "rounding averages out", 2048, 32, 4, 2048, 768)
_SMOKE_CASES = (
    Case("no-tokens", "an empty batch is legal", tokens=0),
    replace(CASES[-1], tokens=16, experts=4, top_k=2, groups=2),
)


def plan(smoke: bool) -> list[Check]:
    """Every check but the GPU's own facts, which `tests.gpu.facts` lists; weightiest first."""
    forms = [
        (layout, activation)
        for layout in LAYOUTS
        for activation in ACTIVATIONS
        if (activation.kind == "relu2") == (layout == "ungated")
    ]
    if smoke:
        return _smoke_plan(*forms[0])
    checks, cases = [], CASES
    bf16, formats = torch.bfloat16, tuple(quantized.FORMATS)
    for dtype in DTYPES:
        for backend in BACKENDS:
            checks += [Check(c.name, backend, dtype, compare, (c,)) for c in cases]
            if dtype != torch.float32:
                many = (LARGE, "stacked", None, MANY_ROWS)
                checks.append(Check("large", backend, dtype, compare, many))
        checks += [
            Check(f"ops {c.name}", b, dtype, single_ops, (c,)) for c in cases for b in STAGES
        ]
    for dtype in DTYPES:
        for backend in BACKENDS:
            checks += [
                Check(f"{layout} {form.kind}", backend, dtype, compare, (cases[-1], layout, form))
                for layout, form in forms
            ]
    checks += [Check(f"dequantize {name}", "cuda", bf16, dequantized, (name,)) for name in formats]
    case = replace(cases[-1], hidden=64, intermediate=32)  # whole groups of every format
    return checks + [
        Check(f"{name} silu", backend, bf16, compare, (case, name))
        for name in formats
        for backend in STAGES
    ]


def _smoke_plan(layout: str, activation: rk.Activation) -> list[Check]:
    """What the interpreter computes in seconds: one dtype and form, since each other combination
    has a self-check of its own, and no rows enough for rounding to average out.
    """
    arguments = [(case,) for case in _SMOKE_CASES] + [(_SMOKE_CASES[0], layout, activation)]
    checks = [
        Check(own[0].name, backend, DTYPES[0], compare, own)
        for own in arguments
        for backend in BACKENDS
    ]
    checks.append(Check("ops", "cuda", DTYPES[0], single_ops, (_SMOKE_CASES[1],)))
    formats = tuple(quantized.FORMATS)
    return checks + [
        Check(f"dequantize {name}", "cuda", DTYPES[0], dequantized, (name,)) for name in formats
    ]
