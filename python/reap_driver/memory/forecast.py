"""How long a run takes: its bytes and operations, divided by measured rates."""

from dataclasses import dataclass

from reap_driver.memory.decision import Decision, Workload
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.memory.rates import Rate, Rates
from reap_driver.memory.stored import Stored


@dataclass(frozen=True)
class Forecast:
    """Work of a run and its seconds at measured rates; None where nothing was measured.

    Attributes:
        read_bytes: weights read from the disk, each once.
        copy_bytes: weights and parked states that cross between host and GPU.
        spill_bytes: states written to a file and read back.
        flops: floating-point operations.
        read_seconds: for weights, by the disk's rate.
        copy_seconds: by the copies' rate; 0 where host and device are one.
        spill_seconds: by the rate of reading, the only one measured: nothing is written.
        compute_seconds: by the rate of a large matrix product, so the least it takes.
        seconds: of all; streamed layers are read and copied while others compute.
    """

    read_bytes: int
    copy_bytes: int
    spill_bytes: int
    flops: int
    read_seconds: float | None
    copy_seconds: float | None
    spill_seconds: float | None
    compute_seconds: float
    seconds: float | None


def forecast(
    plan: Decision, sizes: ModelSizes, stored: Stored, work: Workload, rates: Rates
) -> Forecast:
    """What a run comes to: every weight is read once; states move twice between two layers."""
    moved = 2 * len(sizes.layer_bytes) * work.tokens * sizes.state_bytes
    accelerated = bool(plan.device)
    copied = sizes.weight_bytes + (moved if plan.park in ("host", "file") else 0)
    copy_bytes = copied if accelerated else 0
    spill_bytes = moved if plan.park == "file" else 0
    flops = sizes.flops_per_token * work.tokens
    read = _seconds(stored.nbytes, rates.disk)
    copy, spill = _seconds(copy_bytes, rates.copy), _seconds(spill_bytes, rates.disk)
    compute = flops / rates.matmul.per_second
    total = None
    if read is not None and copy is not None and spill is not None:
        steps = (read + spill, copy, compute)
        total = max(steps) if plan.stream else sum(steps)
    return Forecast(
        stored.nbytes, copy_bytes, spill_bytes, flops, read, copy, spill, compute, total
    )


def _seconds(amount: int, rate: Rate | None) -> float | None:
    """Nothing takes no time; what was not measured takes nobody knows how long."""
    if amount == 0:
        return 0.0
    return None if rate is None else amount / rate.per_second
