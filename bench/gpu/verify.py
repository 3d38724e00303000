"""What comes before a timing: results against float64 within bounds, and what a wrong one becomes.

`tests/gpu` checks by the same bounds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels import LayerStats, cuda
from reap_kernels.errors import BackendUnavailable
from reap_kernels.experts.request import request_of
from reap_kernels.layer import cuda_backend
from reap_kernels.stats import COUNTS, EXTREMA, SUMS
from reap_kernels.testing import largest_relative_error
from reap_kernels.types import ExpertWeights

# Backends with kernels of their own around the products.
STAGES = ("triton", "cuda")
# From here on rounding averages out over an expert's rows.
MANY_ROWS = 64


class CheckFailed(Exception):
    """A check found something wrong; the message says what and by how much."""


class NotHere(Exception):
    """A check, or a provider, has no meaning on this machine; the message says why."""


@dataclass(frozen=True)
class Bounds:
    """Largest accepted relative errors against float64.

    Attributes:
        output: of the output, Frobenius.
        sums: of any expert's sums of first powers.
        squares: of any expert's sums of squares, where errors count twice.
    """

    output: float
    sums: float
    squares: float


def bounds_of(dtype: torch.dtype, backend: str, rows: int = 0) -> Bounds:
    """Bounds of one backend (of `cuda`: of its products); `rows` is the fewest an expert has.

    torch's grouped_mm rounds both halves of the first product before the activation, which our
    kernel keeps in float32: 5.7e-3 was measured for one token of 32 elements.
    """
    if dtype == torch.float32:
        return Bounds(1e-6, 1e-6, 1e-6)
    output = 8e-3 if backend == "grouped_mm" else 5e-3
    return Bounds(output, 2e-4, 4e-4) if rows >= MANY_ROWS else Bounds(output, 1e-2, 2e-2)


def is_red(backend: str, reason: str, device: torch.device) -> bool:
    """Whether a refusal means that something is wrong: `triton` serves every case here, as `cuda`
    does where its module is there, and any backend may refuse only for what it does not do, never
    for a failed self-check.
    """
    if backend == "cuda" and _absent(device):
        return False
    return backend in STAGES or "self-check" in reason


def _absent(device: torch.device) -> bool:
    """Whether no CUDA kernels are there for a device, which a wrong REAP_CUDA_HOST is not."""
    try:
        return cuda.refusal(device) is not None
    except BackendUnavailable:
        return False


def outcome_of(
    error: Exception, backend: str, device: torch.device, wrong: str = "failed"
) -> tuple[str, str]:
    """Result and detail of a row whose work raised; `wrong` is the result of what is not right."""
    if isinstance(error, NotHere):
        return "skipped", str(error)
    if isinstance(error, BackendUnavailable):
        return ("failed" if is_red(backend, str(error), device) else "refused"), str(error)
    if isinstance(error, CheckFailed):
        return wrong, str(error)
    return wrong, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def timed_outcome(
    error: Exception, backend: str, device: torch.device, wrong: str = "failed"
) -> tuple[str, str]:
    """As `outcome_of`, of a timing: what memory does not hold is skipped."""
    if isinstance(error, torch.OutOfMemoryError):
        return stage_outcome(error)
    return outcome_of(error, backend, device, wrong)


def stage_outcome(error: Exception) -> tuple[str, str]:
    """Status and note of what ended a whole stage."""
    said = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return "skipped", f"out of memory: {said[:200]}"
    if isinstance(error, CheckFailed):
        return "failed", str(error)
    return "failed", f"{type(error).__name__}: {said[:300]}"


def products_of(backend: str, hidden: Tensor, top_k: int, experts: ExpertWeights) -> str:
    """Whose products a layer's backend takes, which its rounding and its scratch depend on."""
    if backend != "cuda":
        return backend
    return cuda_backend.stage_backends(request_of("layer", hidden, top_k, experts))["layer"]


def differences(got: LayerStats, want: LayerStats, bounds: Bounds) -> tuple[list[str], float]:
    """What is wrong with statistics, and the largest error of weighted_norm_sum."""
    ours, theirs = got.fields(), want.fields()
    exact = (*COUNTS, "tokens")
    found = [f"{name} differs" for name in exact if not torch.equal(ours[name], theirs[name])]
    for name in SUMS:
        error = largest_relative_error(ours[name], theirs[name])
        bound = bounds.squares if name.endswith("_sq_sum") else bounds.sums
        if not error <= bound:
            found.append(f"{name} is off by {error:.1e}, {bound:.0e} is allowed")
    used = want.count > 0
    for name in EXTREMA:
        mine, true = ours[name], theirs[name]
        near = torch.isclose(
            mine[used], true[used], rtol=10 * bounds.output, atol=10 * bounds.output
        )
        if not (bool(near.all()) and torch.equal(mine[~used], true[~used])):
            found.append(f"{name} differs")
    return found, largest_relative_error(got.weighted_norm_sum, want.weighted_norm_sum)
