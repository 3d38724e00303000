"""The product by TMA on a GPU: checks of the layer with the lines of its table switched on."""

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.gpu.lines import in_force
from bench.gpu.verify import MANY_ROWS, NotHere
from reap_kernels import device as here
from reap_kernels import tuning
from reap_kernels.testing import ACTIVATIONS, CASES
from reap_kernels.tuning import PRODUCTS, Entry, Launch
from tests.gpu import checks, facts
from tests.gpu.checks import Check

BACKEND = "triton"
# For the CPU, where an interpreter runs it.
_SMALL = Launch(16, 32, 16, 2, 4, 2, kernel="tma")
# Several steps along H and I, and parts of tiles of both.
_FORM = replace(CASES[-1], tokens=600, hidden=320, intermediate=192)
LAYOUTS = ("stacked", "interleaved-biased", "ungated", "fp8_block")
_FACTS = (facts.no_host_sync, facts.cuda_graph, facts.other_stream, facts.compiled, facts.chunked)


def lines(arch: str) -> tuple[Entry, ...]:
    """Lines of an architecture's table that name the kernel and are off, as if they were not."""
    if arch == "interpreter":
        kinds = [(op, dtype) for op in PRODUCTS for dtype in ("half", "float32")]
        return tuple(Entry(op, dtype, None, None, _SMALL) for op, dtype in kinds)
    return tuple(
        replace(entry, off=None)
        for entry in tuning.off_entries(arch)
        if entry.launch is not None and entry.launch.kernel == "tma"
    )


def by_tma(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    run: Callable[..., str],
    *arguments: object,
) -> str:
    """Another check, with products by TMA."""
    arch = here.architecture(device)
    found = lines(arch)
    if not found:
        raise NotHere(f"the launch table of {arch} has no line of the kernel `tma` that is off")
    with in_force(device, found):
        return run(device, backend, dtype, *arguments)


def plan(smoke: bool) -> list[Check]:
    """All cases, layouts and formulas in bf16, some in fp16; then graphs, streams, `torch.compile`,
    no synchronization, and a call in parts.
    """
    half = torch.bfloat16
    if smoke:
        small = replace(CASES[-1], tokens=16, experts=4, top_k=2, groups=2)
        return [Check("tma everything", BACKEND, torch.float32, by_tma, (checks.compare, small))]
    large = (checks.LARGE, "stacked", None, MANY_ROWS)
    found = [Check("tma large", BACKEND, half, by_tma, (checks.compare, *large))]
    found += [Check(f"tma {c.name}", BACKEND, half, by_tma, (checks.compare, c)) for c in CASES]
    for layout in LAYOUTS:
        for activation in ACTIVATIONS:
            if (activation.kind == "relu2") == (layout == "ungated"):
                what = (checks.compare, _FORM, layout, activation)
                name = f"tma {layout} {activation.kind}"
                found.append(Check(name, BACKEND, half, by_tma, what))
    for fact in _FACTS:
        name = f"tma {fact.__name__.replace('_', ' ')}"
        # Groups by token are checked by reading them on the CPU, which no graph can hold.
        case = replace(facts.FACT, groups=1) if fact is facts.compiled else facts.FACT
        found.append(Check(name, BACKEND, half, by_tma, (fact, case)))
    for case in (CASES[0], CASES[-1]):
        what = (checks.compare, case)
        found.append(Check(f"tma {case.name}", BACKEND, torch.float16, by_tma, what))
    return found
