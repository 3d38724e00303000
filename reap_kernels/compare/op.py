"""compare_logits: how far apart two models' next-token distributions are, row by row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels.compare import cpu, reference, triton_backend
from reap_kernels.dispatch import Backend, Request, Sizes, always, direct, register, select
from reap_kernels.errors import DtypeError, ShapeError
from reap_kernels.sort.op import cpu_only

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class LogitComparison:
    """What two distributions p (full) and q (candidate) over V tokens have in common, for N rows.

    A row where either has no softmax (a NaN, +inf, or nothing but -inf) has NaN `acceptance` and
    `kl`, and False `same_top`; the log-sum-exp of the one without is NaN.

    Attributes:
        acceptance: [N] float32, sum over v of min(p_v, q_v): the share of the candidate's tokens
            that speculative sampling would accept (Leviathan et al., arXiv 2211.17192, section
            3.2), the measure EvoESAP searches by (arXiv 2603.06003). 1 where p = q.
        kl: [N] float32, KL(p || q) = sum over v of p_v log(p_v / q_v), in nats; inf where q_v = 0
            and p_v > 0 (in float32) for some v. Rounding can make it as small as -2e-6.
        full_lse: [N] float32, log-sum-exp of full's logits.
        candidate_lse: [N] float32, that of candidate's.
        same_top: [N] bool, whether both are largest at the same token, the first of equals.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> found = rk.compare_logits(torch.tensor([[0.0, 9.0]]), torch.tensor([[9.0, 0.0]]))
        >>> found.same_top
        tensor([False])
    """

    acceptance: Tensor
    kl: Tensor
    full_lse: Tensor
    candidate_lse: Tensor
    same_top: Tensor


def compare_logits(
    full: Tensor,
    candidate: Tensor,
    *,
    full_lse: Tensor | None = None,
    backend: str | None = None,
) -> LogitComparison:
    """Compares p = softmax(full) with q = softmax(candidate), without storing either; waits for
    nothing on a GPU. Logits of -inf are tokens of probability 0.

    Sums are accumulated in float32: against float64 on the same logits, `acceptance` and `kl` are
    within 2e-6 times max(1, value), the log-sum-exps within 2e-6 times max(1, |value|). Each row's
    result depends on nothing but the row, and is the same from run to run.

    Args:
        full: [N, V] bf16, fp16 or fp32, any strides.
        candidate: [N, V] likewise, of the same or another dtype, on the same device.
        full_lse: [N] float32, `full_lse` of an earlier comparison of the same `full`, which saves
            some backends the exponentials of a pass. Default: computed.
        backend: explicit backend, never falls back. Default: see `explain()`.

    Returns:
        A `LogitComparison` of N rows.

    Raises:
        ShapeError, DtypeError: inputs that do not fit each other; the message names the input.
        BackendUnavailable: no backend serves, or the requested one refuses, with the reason.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> logits = torch.randn(4, 1000)
        >>> bool((rk.compare_logits(logits, logits).acceptance > 0.9999).all())
        True
    """
    _check(full, candidate, full_lse)
    run = _run if direct(full) else torch.ops.reap_kernels.compare_logits
    return LogitComparison(*run(full, candidate, full_lse, backend))


def _check(full: Tensor, candidate: Tensor, full_lse: Tensor | None) -> None:
    """Raises unless both are [N, V] floats on one device, and `full_lse` is [N] float32."""
    if full.ndim != 2 or full.shape[1] == 0:
        raise ShapeError(f"full has shape {tuple(full.shape)}; expected [N, V] with V >= 1")
    if candidate.shape != full.shape:
        raise ShapeError(
            f"candidate has shape {tuple(candidate.shape)}; it must equal full's "
            f"{tuple(full.shape)}"
        )
    for name, logits in (("full", full), ("candidate", candidate)):
        if logits.dtype not in FLOATS:
            raise DtypeError(f"{name} is {logits.dtype}; expected bf16, fp16 or fp32")
    if candidate.device != full.device:
        raise DtypeError(f"full is on {full.device}, candidate on {candidate.device}; move one")
    if full_lse is None:
        return
    if tuple(full_lse.shape) != (len(full),):
        raise ShapeError(f"full_lse has shape {tuple(full_lse.shape)}; expected ({len(full)},)")
    if full_lse.dtype != torch.float32 or full_lse.device != full.device:
        raise DtypeError(
            f"full_lse is {full_lse.dtype} on {full_lse.device}; expected float32 on {full.device}"
        )


def _run(
    full: Tensor, candidate: Tensor, full_lse: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, vocabulary = full.shape
    sizes = Sizes(rows, 1, hidden=vocabulary)
    request = Request("compare", full.device, full.dtype, sizes=sizes)
    if full_lse is not None:
        full_lse = full_lse.contiguous()
    with torch.no_grad():
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = select(request, backend).run(
            full, candidate, full_lse
        )
    return results


@torch.library.custom_op("reap_kernels::compare_logits", mutates_args=())
def _compare_logits(
    full: Tensor, candidate: Tensor, full_lse: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _run(full, candidate, full_lse, backend)


@_compare_logits.register_fake
def _(full: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acceptance, kl, full_lse, candidate_lse = (
        full.new_empty(len(full), dtype=torch.float32) for _ in range(4)
    )
    return acceptance, kl, full_lse, candidate_lse, full.new_empty(len(full), dtype=torch.bool)


register(
    Backend("compare", "reference", lambda _: 0, lambda _: None, always(reference.compare_logits))
)
register(Backend("compare", "cpu", lambda _: 10, cpu_only, always(cpu.compare_logits)))
register(triton_backend.BACKEND)
