"""The comparison of logits on a GPU against float64."""

import torch

import reap_kernels as rk
from bench.gpu.logits import NAME, pair
from bench.gpu.verify import CheckFailed
from tests.gpu.checks import Check, poisoned

# Rows and vocabulary: Qwen3's; a prime, whose rows begin anywhere; one row of one token.
SIZES = ((64, 151936), (17, 50261), (1, 1))
_SMOKE = ((3, 257),)
# Absolute below 1, relative above; see `reap_kernels.compare_logits`.
_BOUND = 2e-6


def compared(
    device: torch.device, backend: str, dtype: torch.dtype, rows: int, vocabulary: int
) -> str:
    """Every result against float64's, with and without a known log-sum-exp, twice the same bits."""
    both = pair(rows, vocabulary, dtype, device)
    want = rk.compare_logits(*both, backend="reference")
    worst = 0.0
    for known in (None, want.full_lse):
        with poisoned():
            got, again = (
                rk.compare_logits(*both, full_lse=known, backend=backend) for _ in range(2)
            )
        for name in ("acceptance", "kl", "full_lse", "candidate_lse"):
            ours, theirs = getattr(got, name), getattr(want, name)
            error = float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())
            worst = max(worst, error)
            if not error <= _BOUND:
                raise CheckFailed(f"{name} is off by {error:.1e}, {_BOUND:.0e} is allowed")
            if not torch.equal(ours, getattr(again, name)):
                raise CheckFailed(f"{name} has other bits the second time")
        if not torch.equal(got.same_top, want.same_top):
            raise CheckFailed("same_top differs")
    return f"all within {worst:.1e}"


def plan(smoke: bool) -> list[Check]:
    """All sizes and dtypes."""
    dtypes = (torch.float32,) if smoke else (torch.bfloat16, torch.float32, torch.float16)
    return [
        Check(f"{NAME} {rows} x {vocabulary}", "triton", dtype, compared, (rows, vocabulary))
        for dtype in dtypes
        for rows, vocabulary in (_SMOKE if smoke else SIZES)
    ]
