"""When the `triton` backend serves `rotary`, and its self-check."""

from collections.abc import Callable

import torch
from torch import Tensor

from reap_kernels import selfcheck
from reap_kernels.dispatch import Backend, Request
from reap_kernels.norm.triton_backend import BOUNDS, limits
from reap_kernels.rotary import reference
from reap_kernels.rotary.call import Form
from reap_kernels.sort.triton_backend import priority

Rotary = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Form],
    tuple[Tensor, Tensor | None],
]

# Every order of pairs, with norms and without, of all columns and of half of them: what is rotated,
# whether it is normed, and the form.
_FORMS = (
    (1.0, True, Form(False, False, False, False, 0, 1e-6, 0.0, True)),
    (1.0, True, Form(True, False, True, True, 1, 1e-6, 1.0, False)),
    (1.0, False, Form(True, True, True, False, 0, 1e-6, 0.0, False)),
    (0.5, True, Form(False, False, False, False, 0, 1e-6, 1.0, False)),
)


def refusal(request: Request) -> str | None:
    """Why `rotary` cannot be served, or None."""
    width = request.sizes.head
    return limits(request, width) or selfcheck.verdict(
        "rotary",
        request.device,
        {"dtype": request.dtype, "width": width},
        lambda: check(prepare(request), request),
    )


def prepare(request: Request) -> Rotary:
    """See `reap_kernels.rotary.op.rotary`."""
    from reap_kernels.rotary import gpu

    return gpu.rotary


def check(run: Rotary, request: Request) -> str | None:
    """Compares with the reference's results, heads of several counts, in each of `_FORMS`."""
    rng = torch.Generator().manual_seed(0)
    width = request.sizes.head

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(request.device, request.dtype)

    # As projections make them: heads of a token lie together.
    q, k = (made(2, 3, heads, width).transpose(1, 2) for heads in (5, 2))
    weights = made(width), made(width)
    for share, normed, form in _FORMS:
        rotated = int(share * (width - form.start)) // 2 * 2
        if not rotated:
            continue
        angle = made(1, 3, rotated // 2 if form.per_pair else rotated).float()
        tables = angle.cos().to(request.dtype), angle.sin().to(request.dtype)
        q_weight, k_weight = weights if normed else (None, None)
        got = run(q, k, *tables, q_weight, k_weight, form)
        want = reference.rotary(q, k, *tables, q_weight, k_weight, form)
        for name, ours, theirs in zip(("q", "k"), got, want, strict=True):
            reason = _off(name, ours, theirs, request.dtype)
            if reason is not None:
                return reason
    return None


def _off(name: str, got: Tensor | None, want: Tensor | None, dtype: torch.dtype) -> str | None:
    """What is wrong with a result, each element of which is a difference of two products."""
    if got is None or want is None:
        return f"{name} is missing"
    # Of both factors at most, where they cancel out: the largest of a head stands for them.
    size = want.double().abs().amax(dim=-1, keepdim=True).clamp(min=1e-3)
    worst = float(((got.double() - want.double()).abs() / size).max())
    bound = 6 * BOUNDS[dtype]
    return None if worst <= bound else f"{name} is off by {worst:.1e}, {bound:.0e} is allowed"


BACKEND = Backend("rotary", "triton", priority, refusal, prepare)
