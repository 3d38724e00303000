"""When the `triton` backend serves `compare`, and its self-check."""

from collections.abc import Callable

import torch
from torch import Tensor

from reap_kernels import selfcheck
from reap_kernels.compare import reference
from reap_kernels.dispatch import Backend, Request
from reap_kernels.sort.triton_backend import limits, priority

Compare = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]

# Errors of sums of V terms in float32, of probabilities and of logarithms, absolute.
BOUND = 2e-6
# Vocabularies of several blocks and part of one; rows that begin at 16 bytes, and anywhere.
_SIZES = (4096 + 48, 5003)


def refusal(request: Request) -> str | None:
    """Why `compare_logits` cannot be served, or None."""
    return limits(request) or selfcheck.verdict(
        "compare",
        request.device,
        {"dtype": request.dtype},
        lambda: check(prepare(request), request),
    )


def prepare(request: Request) -> Compare:
    """See `reap_kernels.compare.op.compare_logits`."""
    from reap_kernels.compare import gpu

    return gpu.compare_logits


def check(run: Compare, request: Request) -> str | None:
    """Compares with the reference's results, equal maxima and logits of -inf among them."""
    rng = torch.Generator().manual_seed(0)
    names = ("acceptance", "kl", "full_lse", "candidate_lse")
    for vocabulary in _SIZES:
        full = 3 * torch.randn(33, vocabulary, generator=rng)
        candidate = full + torch.rand(33, 1, generator=rng) * torch.randn(full.shape, generator=rng)
        full[::4, ::3] = -torch.inf
        f, c = (x.round(decimals=1).to(request.device, request.dtype) for x in (full, candidate))
        want = reference.compare_logits(f, c, None)
        for known in (None, want[2]):
            got = run(f, c, known)
            for name, ours, theirs in zip(names, got, want, strict=False):
                error = float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())
                if not error <= BOUND:
                    return f"{name} is off by {error:.1e}, {BOUND:.0e} is allowed"
            if not torch.equal(got[4], want[4]):
                return "same_top differs from the reference's"
    return None


BACKEND = Backend("compare", "triton", priority, refusal, prepare)
