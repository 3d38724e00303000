"""cuDNN's attention on a GPU: served, as near as the model's own choice, and timed beside it."""

import statistics
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu import clock
from bench.gpu.verify import CheckFailed, NotHere
from reap_driver.model.attention import cudnn_first, has_cudnn
from tests.gpu.checks import Check
from tests.gpu.models import library, near

TORCH = "torch"
# Qwen3-30B-A3B: 32 heads of 128 with 4 for keys and values, a batch of 8 sequences of 2,048.
_HEADS, _SHARED, _WIDTH, _ROWS, _LENGTH = 32, 4, 128, 8, 2048
_ROUNDS = 30
_BF16 = 1e-2  # rounding of softmax's factors and of the sums, in other orders


def _needs(device: torch.device) -> None:
    if not has_cudnn(device):
        raise NotHere("needs a GPU of compute capability 9.0 with cuDNN")


def observed(device: torch.device, _: str, dtype: torch.dtype) -> str:
    """A model's output with cuDNN's attention is that of its own choice. Every token goes to every
    expert: which few it chose could follow from rounding.
    """
    _needs(device)
    from tests.driver import zoo

    config, model = zoo.tiny("qwen3_moe", dtype=dtype, head_dim=64, num_experts_per_tok=8)
    model.set_attn_implementation("sdpa")
    model.to(device)
    batch = zoo.tiny_inputs("qwen3_moe", config, batch=4, seq=128)
    logits = []
    for choice in ("model", "cudnn"):
        with library().observe(model, attention=choice) as obs:
            logits.append(obs(**batch).logits)
        if obs.stats.provenance.get("attention", "model") != choice:
            raise CheckFailed(f"the statistics do not record {choice!r}")
    return near(logits[1], logits[0], 3 * _BF16, "the output")


def timed(device: torch.device, _: str, dtype: torch.dtype) -> str:
    """Attention of a published model's size by both, in turn; says the medians of both."""
    _needs(device)
    rng = torch.Generator(device).manual_seed(0)
    sizes = ((_HEADS, _LENGTH), (_SHARED, _LENGTH), (_SHARED, _LENGTH))
    q, k, v = (
        torch.randn(_ROWS, heads, length, _WIDTH, generator=rng, device=device).to(dtype)
        for heads, length in sizes
    )

    def own() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def preferred() -> Tensor:
        with cudnn_first():
            return own()

    said = near(preferred(), own(), _BF16, "attention")
    taken: dict[str, list[float]] = {"own": [], "cudnn": []}
    for _round in range(_ROUNDS):
        taken["own"] += clock.times([own], device, 1)
        taken["cudnn"] += clock.times([preferred], device, 1)
    first, second = (1e3 * statistics.median(seconds) for seconds in taken.values())
    return f"{said}; {second:.3f} ms beside {first:.3f} ms of torch's own choice"


def plan(smoke: bool) -> list[Check]:
    """Both checks, in the dtypes that models have on GPUs."""
    dtypes = (torch.bfloat16,) if smoke else (torch.bfloat16, torch.float16)
    make = partial(Check, backend=TORCH, arguments=())
    return [
        make(name=name, dtype=dtype, run=run)
        for name, run in (
            ("cuDNN's attention, observed", observed),
            ("cuDNN's attention, timed", timed),
        )
        for dtype in dtypes
    ]
