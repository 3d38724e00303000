"""Norms and rotary embeddings on a GPU against a model's own operations there, and float64."""

import torch
from torch import Tensor

import reap_kernels as rk
from bench.gpu.norms import EPS, differing, eager_norm, eager_rotary
from bench.gpu.verify import CheckFailed
from tests.gpu.checks import Check, poisoned

# Rows and columns: Qwen3's, DeepSeek-V3's, heads, the widest, and what no block divides.
NORMS = ((4096, 2048), (512, 7168), (4096, 128), (64, 16384), (37, 1001))
# Tokens, heads of q and k, columns, and those that are rotated: Qwen3's, Qwen3.5's, an odd one.
ROTATIONS = ((512, 32, 4, 128, 128), (512, 32, 2, 256, 64), (13, 5, 3, 30, 18))
_SMOKE = ((5, 40),), ((2, 3, 1, 8, 8),)
# Units in the last place: of a norm that is rounded before it is multiplied, and of the largest of
# a head after its rotation.
_NORM_UNITS, _HEAD_UNITS = 2, 4


def normed(device: torch.device, backend: str, dtype: torch.dtype, rows: int, width: int) -> str:
    """Alone and of a sum, twice the same bits; the sum has torch's."""
    x, residual, weight = (_normal(device, dtype, n, rows, width) for n in range(3))
    weight = weight[0]
    with poisoned():
        got, again = (
            rk.rms_norm(x, weight, EPS, round_first=True, residual=residual, backend=backend)
            for _ in range(2)
        )
    _same(got, again)
    if not torch.equal(got[1], residual + x):
        raise CheckFailed("the sum has other bits than torch's")
    share = differing([got[0]], [eager_norm(got[1], weight)], _NORM_UNITS)
    gemma = rk.rms_norm(x, weight, EPS, offset=1.0, backend=backend)
    want = rk.rms_norm(x, weight, EPS, offset=1.0, backend="reference")
    share = max(share, differing([gemma], [want], _NORM_UNITS))
    return f"{share:.1e} of the elements differ"


def rotated(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    tokens: int,
    heads: int,
    heads_k: int,
    width: int,
    turned: int,
) -> str:
    """Halves after norms against a model's; without norms and in every form the bits of torch's
    operations, which the CPU backend is made of.
    """
    q, k = (_normal(device, dtype, n, 2, tokens, n, width) for n in (heads, heads_k))
    weights = [_normal(device, dtype, n, width) for n in (1, 2)]
    angles = _normal(device, torch.float32, 7, 2, tokens, turned)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    share = 0.0
    if turned == width:
        norms = dict(zip(("q_weight", "k_weight"), weights, strict=True))
        with poisoned():
            got, again = (
                rk.rotary(
                    *(x.transpose(1, 2) for x in (q, k)),
                    *(cos, sin),
                    **norms,
                    eps=EPS,
                    round_first=True,
                    backend=backend,
                )
                for _ in range(2)
            )
        _same(got, again)
        pairs = zip((q, k), weights, strict=True)
        want = [eager_rotary(x, weight, cos, sin) for x, weight in pairs]
        share = differing([x for x in got if x is not None], want, _HEAD_UNITS)
    for interleaved, separate, float32 in (
        (False, False, False),
        (True, False, True),
        (True, True, False),
    ):
        inputs = [x.transpose(1, 2) for x in (q, k)]
        form = {"interleaved": interleaved, "separate": separate, "float32": float32}
        start = width - turned
        with poisoned():
            plain = rk.rotary(*inputs, cos, sin, start=start, backend=backend, **form)
        here = [x.cpu() for x in (*inputs, cos, sin)]
        _same([x.cpu() for x in plain], rk.rotary(*here, start=start, backend="cpu", **form))
    return f"rotations have torch's bits, {share:.1e} of the elements differ after norms"


def large(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    """More than 2^31 elements: the last rows are what they are alone."""
    x = torch.zeros((1 << 20) + 16, 2048, dtype=dtype, device=device)
    x[-16:] = _normal(device, dtype, 0, 16, 2048)
    _same([rk.rms_norm(x, None, EPS, backend=backend)[-16:]],
          [rk.rms_norm(x[-16:].clone(), None, EPS, backend=backend)])  # fmt: skip
    q = x.view(1, -1, 16, 128).transpose(1, 2)
    cos, sin = (_normal(device, dtype, n, 1, 1, 128).expand(1, q.shape[2], 128) for n in (1, 2))
    whole = rk.rotary(q, None, cos, sin, backend=backend)[0]
    alone = rk.rotary(q[:, :, -16:], None, cos[:, -16:], sin[:, -16:], backend=backend)[0]
    _same([whole[:, :, -16:]], [alone])
    return "the last rows have the bits that they have alone"


def unsynchronized(device: torch.device, backend: str, dtype: torch.dtype) -> str:
    """No call waits for the device, once its kernels are compiled and checked."""
    x = _normal(device, dtype, 0, 64, 8, 128)
    cos = x[:, 0].unsqueeze(0)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            rk.rms_norm(x, x[0, 0], EPS, residual=x, backend=backend)
            heads = x.unsqueeze(0).transpose(1, 2)
            rk.rotary(heads, heads, cos, cos, q_weight=x[0, 0], backend=backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "no synchronization"


def _normal(device: torch.device, dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    rng = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=rng, device=device).to(dtype)


def _same(got: object, again: object) -> None:
    """Raises unless two results have the same bits."""
    for ours, theirs in zip(got, again, strict=True):  # type: ignore[call-overload]
        if not torch.equal(ours, theirs):
            raise CheckFailed("other bits than they should have")


def plan(smoke: bool) -> list[Check]:
    """All sizes and dtypes; one of each in the interpreter."""
    dtypes = (torch.float32,) if smoke else (torch.bfloat16, torch.float32, torch.float16)
    norms, rotations = _SMOKE if smoke else (NORMS, ROTATIONS)
    checks = [
        Check(f"{name} {'x'.join(map(str, sizes))}", "triton", dtype, run, sizes)
        for dtype in dtypes
        for name, run, several in (("norm", normed, norms), ("rotary", rotated, rotations))
        for sizes in several
    ]
    if not smoke:
        checks += [
            Check("norm and rotary, 2^31 elements", "triton", torch.bfloat16, large, ()),
            Check("norm and rotary, no wait", "triton", torch.bfloat16, unsynchronized, ()),
        ]
    return checks
