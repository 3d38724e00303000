"""Gram matrices and cross moments on a GPU against float64."""

from dataclasses import replace

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.verify import CheckFailed, NotHere
from reap_kernels import LayerGram, LayerStats
from reap_kernels.gram.triton_backend import difference
from reap_kernels.testing import CASES, Case, make_experts, make_inputs, relative_error
from tests.gpu.checks import BACKENDS, LARGE, Check, observe, poisoned, same_bits

# Largest accepted relative errors: h is rounded, and once more what the sums are made of.
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6}
# Several blocks, none of them whole; rows of the second do not begin at 16 bytes.
WIDE = Case("wide", "several block rows", 80, 6, 2, 128, 200, skew="zipf", masked=0.2)
ODD = replace(WIDE, name="odd", hidden=9, intermediate=77)
# Cases of every dtype and op; the layer in bf16 takes all.
_NAMED = ("no-tokens", "one-token", "zipf", "all-to-one", "everything")
_SMOKE = replace(CASES[-1], tokens=16, experts=4, top_k=2, groups=2, hidden=16, intermediate=24)


def _empty(case: Case, device: torch.device) -> LayerGram:
    """Sums whose upper triangles are NaN: nothing may read them."""
    sums = LayerGram(case.experts, case.intermediate, device)
    sums.gram += torch.full(sums.gram.shape[1:], torch.nan, device=device).triu(1)
    return sums


def _factors(case: Case, device: torch.device) -> Tensor:
    """A factor of each token, some of them 0."""
    factors = torch.rand(case.tokens, generator=torch.Generator().manual_seed(9)) * 3
    return factors.masked_fill(factors < 0.5, 0.0).to(device)


def summed(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """A layer's sums, of tokens with factors of their own: against the reference, twice the same
    bits, and the output and the statistics the bits of a call without.
    """
    inputs, scale = make_inputs(case, dtype, device=device), _factors(case, device)
    experts = make_experts(case, dtype=dtype, device=device)
    got, again, want = (_empty(case, device) for _ in range(3))
    with poisoned():
        out, stats = observe(inputs, experts, backend, case.groups, gram=got, gram_scale=scale)
        observe(inputs, experts, backend, case.groups, gram=again, gram_scale=scale)
        plain, without = observe(inputs, experts, backend, case.groups)
    observe(inputs, experts, "reference", case.groups, gram=want, gram_scale=scale)
    found = same_bits(stats, without) if case.tokens else []
    if not torch.equal(out, plain):
        found.append("the output has other bits than without Gram matrices")
    return _judged(got, again, want, dtype, found)


def alone(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """The op on given rows, NaN where they do not count."""
    inputs, rng = make_inputs(case, dtype, device=device), torch.Generator(device).manual_seed(3)
    routing = rk.sort_by_expert(inputs.topk_ids, case.experts, topk_weights=inputs.topk_weights)
    shape, scale = (len(routing.gather_index), case.intermediate), _factors(case, device)
    h = torch.randn(shape, generator=rng, device=device, dtype=dtype)
    counted = (inputs.topk_weights != 0) & (scale != 0)[:, None]
    if inputs.mask is not None:
        counted &= inputs.mask[:, None]
    h[~counted.flatten()[routing.gather_index]] = torch.nan
    sums = [_empty(case, device) for _ in range(3)]
    rows = (h, routing, inputs.topk_weights)
    with poisoned():
        for own in sums[:2]:
            rk.gram(*rows, own, mask=inputs.mask, scale=scale, backend=backend)
    rk.gram(*rows, sums[2], mask=inputs.mask, scale=scale, backend="reference")
    return _judged(*sums, dtype, [])


def _judged(
    got: LayerGram, again: LayerGram, want: LayerGram, dtype: torch.dtype, found: list[str]
) -> str:
    """Raises unless sums are the reference's, twice with the same bits."""
    problem = difference(got, want, BOUNDS[dtype])
    if problem:
        found.append(problem)
    lower = [sums.gram.tril() for sums in (got, again)]
    rest = zip(got.packed()[1:], again.packed()[1:], strict=True)
    if not (torch.equal(*lower) and all(torch.equal(*pair) for pair in rest)):
        found.append("sums have other bits the second time")
    if found:
        raise CheckFailed("; ".join(found))
    pairs = ([sums.second(e) for e in range(sums.num_experts)] for sums in (got, want))
    return f"Gram matrices {relative_error(*map(torch.stack, pairs)):.1e}"


def crossed(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """Cross moments against the reference, twice the same bits; masked targets are NaN."""
    inputs = make_inputs(case, dtype, device=device)
    experts = make_experts(case, dtype=dtype, device=device)
    targets = inputs.hidden.flip(0).clone()
    if inputs.mask is not None:
        targets[~inputs.mask] = torch.nan
    shape = (case.experts, case.hidden, case.intermediate)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, targets)
    got, again, want = (torch.zeros(shape, device=device) for _ in range(3))
    with poisoned():
        for out in (got, again):
            rk.cross(*call, out, mask=inputs.mask, backend=backend)
    rk.cross(*call, want, mask=inputs.mask, backend="reference")
    error = relative_error(got, want)
    if not error <= BOUNDS[dtype]:
        raise CheckFailed(f"moments are off by {error:.1e}, {BOUNDS[dtype]:.0e} is allowed")
    if not torch.equal(got, again):
        raise CheckFailed("moments have other bits the second time")
    return f"moments {error:.1e}"


def queued(device: torch.device, backend: str, dtype: torch.dtype, case: Case) -> str:
    """A warmed-up call with Gram matrices never waits for the device, and a graph of it replays to
    the same bits.
    """
    if device.type != "cuda":
        raise NotHere("needs a CUDA device")
    inputs = make_inputs(case, dtype, device=device)
    experts = make_experts(case, dtype=dtype, device=device)
    warm, sums = (LayerGram(case.experts, case.intermediate, device) for _ in range(2))
    observe(inputs, experts, backend, case.groups, gram=warm)
    stats = LayerStats(case.experts, case.groups, device)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, stats)
    rest = {"mask": inputs.mask, "group": inputs.group, "backend": backend, "gram": sums}
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        rk.observe_layer(*call, **rest)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    found = [] if torch.equal(sums.gram, warm.gram) else ["sums have other bits the second time"]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        rk.observe_layer(*call, **rest)
    graph.replay()
    torch.cuda.synchronize(device)
    if not torch.equal(sums.count, 2 * warm.count):
        found.append("a replay does not add what the call added")
    error = relative_error(sums.gram, 2 * warm.gram)
    if not error <= BOUNDS[torch.float32]:
        found.append(f"a replay adds other sums, off by {error:.1e}")
    if found:
        raise CheckFailed("; ".join(found))
    return "no wait, captured and replayed"


def plan(smoke: bool) -> list[Check]:
    """Every check; of the layer by other backends, whose Gram matrices are those of `triton`, one
    small case and one in which rounding averages out.
    """
    if smoke:
        bf16 = torch.bfloat16
        checks = [Check("cross", "triton", bf16, crossed, (_SMOKE,))]
        checks += [Check(f"gram {_SMOKE.name}", b, bf16, summed, (_SMOKE,)) for b in BACKENDS]
        return [*checks, Check("gram queued", "triton", bf16, queued, (_SMOKE,))]
    checks = []
    some = [case for case in CASES if case.name in _NAMED] + [WIDE, ODD, LARGE]
    for dtype in BOUNDS:
        for backend in BACKENDS:
            first = backend == "triton" and dtype == torch.bfloat16
            cases = [*CASES, WIDE, ODD, LARGE] if first else some
            cases = cases if backend == "triton" else [CASES[-1], LARGE]
            checks += [Check(f"gram {c.name}", backend, dtype, summed, (c,)) for c in cases]
        checks += [
            Check(f"{name} {case.name}", "triton", dtype, run, (case,))
            for name, run in (("gram op", alone), ("cross", crossed))
            for case in some
        ]
    # Groups by token are checked by reading them on the CPU, which no graph can hold.
    case = replace(WIDE, groups=1)
    return checks + [
        Check("gram queued", backend, torch.bfloat16, queued, (case,)) for backend in BACKENDS
    ]
