"""Launches of norms and rotary embeddings to compile: of models, the widest, odd ones."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from reap_kernels.norm import gpu as norm
from reap_kernels.rotary import gpu as rotary
from reap_kernels.rotary.call import Form

Calls = Iterator[tuple[str, Callable[[], object]]]

_EPS = 1e-6
# Name, heads of q and k, D, R, form, whether heads are normed.
_HALVES = Form(False, False, False, False, 0, _EPS, 0.0, True)
_ROTATIONS = {
    "Qwen3": (32, 4, 128, 128, _HALVES, True),
    "Qwen3.5": (32, 2, 256, 64, _HALVES._replace(offset=1.0, round_first=False), True),
    "gpt-oss": (64, 8, 64, 64, _HALVES._replace(per_pair=True), False),
    "GLM-4": (32, 2, 128, 64, _HALVES._replace(interleaved=True, per_pair=True), False),
    "Ernie": (20, 4, 128, 128, Form(True, False, True, True, 0, _EPS, 0.0, True), False),
    "DeepSeek-V3": (128, 1, 64, 64, Form(True, True, True, False, 0, _EPS, 0.0, True), False),
    "odd sizes": (5, 3, 30, 18, _HALVES._replace(start=5), True),
}


def calls(dtype: torch.dtype) -> Calls:
    """What launches each kernel, by a name of its own; all in bf16, some in the other dtypes."""
    half = dtype == torch.bfloat16
    for width in (128, 2048, 16384) if half else (2048,):
        yield f"norm, H = {width}", partial(_norm, width, dtype, False, True)
        yield f"sum and norm, H = {width}", partial(_norm, width, dtype, True, False)
    if half:
        yield "norm, odd sizes", partial(_odd_norm, dtype)
    for name in _ROTATIONS if half else ("Qwen3", "Qwen3.5", "DeepSeek-V3"):
        yield f"rotary, {name}", partial(_rotary, dtype, *_ROTATIONS[name])


def _norm(width: int, dtype: torch.dtype, added: bool, round_first: bool) -> None:
    x = torch.zeros(64, width, dtype=dtype)
    offset = 0.0 if round_first else 1.0
    norm.rms_norm(x, x[0].clone(), x if added else None, _EPS, offset, round_first)


def _odd_norm(dtype: torch.dtype) -> None:
    """Heads whose columns lie apart, and a weight of another dtype."""
    x = torch.zeros(2, 3, 5, 270, dtype=dtype).transpose(1, 2)[..., ::2]
    norm.rms_norm(x, torch.zeros(135), None, _EPS, 0.0, True)


def _rotary(
    dtype: torch.dtype, heads: int, heads_k: int, width: int, rotated: int, form: Form, normed: bool
) -> None:
    q, k = (torch.zeros(1, 4, n, width, dtype=dtype).transpose(1, 2) for n in (heads, heads_k))
    table = torch.zeros(1, 4, rotated, dtype=dtype)
    table = table[..., : rotated // 2] if form.per_pair else table
    weight = torch.zeros(width, dtype=dtype) if normed else None
    rotary.rotary(q, k, table, table, weight, weight, form)
