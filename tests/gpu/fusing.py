"""Fused norms and rotations on a GPU: as near as rounding, and timed beside the model's own."""

import statistics
from functools import partial

import torch

from bench.gpu import clock
from bench.gpu.verify import CheckFailed, NotHere
from tests.gpu.checks import Check
from tests.gpu.models import library, near

TORCH = "torch"
# Layers of Qwen3-30B-A3B's hidden sizes with few experts, on a batch of 8 sequences of 2,048.
_SIZES = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
}
_BATCH, _LENGTH, _ROUNDS = 8, 2048, 30
_BF16 = 2e-2  # single elements round to the other neighbor in each of two layers


def observed(device: torch.device, _: str, dtype: torch.dtype, name: str) -> str:
    """A model's output is its own, and the statistics say what was fused."""
    from tests.driver import zoo
    from tests.driver.fusing.expected import COUNTS

    config, model = zoo.tiny(name, dtype=dtype)
    model.to(device)
    batch = zoo.tiny_inputs(name, config, batch=4, seq=128)
    logits = []
    for fuse in (False, True):
        with library().observe(model, fuse=fuse) as obs:
            logits.append(obs(**batch).logits)
    found, expected = obs.fused.counts, COUNTS[name]._asdict()
    if found != expected:
        raise CheckFailed(f"{found} is bound, not {expected}: {list(obs.fused.left.values())[:2]}")
    return near(logits[1], logits[0], _BF16, "the output")


def timed(device: torch.device, _: str, dtype: torch.dtype) -> str:
    """A forward of two layers by both, in turn; says the medians of both."""
    if device.type != "cuda":
        raise NotHere("times on a CPU are those of no kernel")
    from tests.driver import zoo

    _, model = zoo.tiny("qwen3_moe", dtype=dtype, **_SIZES)
    model.set_attn_implementation("sdpa")
    model.to(device)
    ids = torch.randint(3, 90, (_BATCH, _LENGTH), device=device)
    taken: dict[bool, list[float]] = {False: [], True: []}

    def run() -> object:
        with torch.no_grad():
            return model.model(ids, use_cache=False)

    for round_ in range(_ROUNDS + 1):
        for fuse in taken:
            if fuse:
                with library().fused(model):
                    run()  # the first call is compared
                    seconds = clock.times([run], device, 1)
            else:
                seconds = clock.times([run], device, 1)
            taken[fuse] += seconds if round_ else []
    own, fused = (1e3 * statistics.median(seconds) for seconds in taken.values())
    return f"{fused:.3f} ms beside {own:.3f} ms of the model's own code"


def plan(smoke: bool) -> list[Check]:
    """Models of several norms and rotations, then time."""
    make = partial(Check, backend=TORCH, dtype=torch.bfloat16)
    names = ("qwen3_moe", "deepseek_v3", "qwen3_next", "gemma4", "gpt_oss")
    checks = [
        make(name=f"fused, {name}", run=observed, arguments=(name,))
        for name in names[: 1 if smoke else None]
    ]
    return checks if smoke else [*checks, make(name="fused, timed", run=timed, arguments=())]
