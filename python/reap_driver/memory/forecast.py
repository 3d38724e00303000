"""Forecasts the duration of a run: its bytes and operations divided by rates."""

from dataclasses import dataclass

from reap_driver.memory.checkpoint_size import CheckpointSize
from reap_driver.memory.decision import Decision
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.memory.rates import Rate, Rates
from reap_driver.memory.workload import Workload


@dataclass(frozen=True)
class Forecast:
    """Bytes and operations of a run and its duration; None where a rate is not known.

    Attributes:
        read_bytes: bytes of weights read from the disk, each weight once, also by several ranks:
            the page cache may serve the others.
        copy_bytes: bytes of weights and hidden states copied between host and one GPU.
        spill_bytes: bytes of hidden states written to files and read back, by all ranks.
        flops: number of floating-point operations of one rank.
        read_seconds: time to read the weights, at the disk's rate.
        copy_seconds: time to copy, at the copy rate; 0 on a CPU.
        spill_seconds: time for the spilled states, at the read rate: writing is not measured.
        compute_seconds: time to compute at the rate of a large matrix product: a lower bound.
        seconds: total; a streamed model reads and copies while it computes.
    """

    read_bytes: int
    copy_bytes: int
    spill_bytes: int
    flops: int
    read_seconds: float | None
    copy_seconds: float | None
    spill_seconds: float | None
    compute_seconds: float | None
    seconds: float | None


def forecast(
    plan: Decision,
    sizes: ModelSizes,
    stored: CheckpointSize,
    work: Workload,
    rates: Rates,
    ranks: int = 1,
) -> Forecast:
    """The forecast of a run: each weight is read once; states move twice between two layers.

    Args:
        plan: how one rank holds the model.
        sizes: of the model.
        stored: its size on the disk.
        work: of one rank.
        rates: of the machine.
        ranks: processes that share its disk.
    """
    moved = 2 * len(sizes.layer_bytes) * work.tokens * sizes.state_bytes
    accelerated = bool(plan.device)
    copied = sizes.weight_bytes + (moved if plan.offload in ("host", "file") else 0)
    copy_bytes = copied if accelerated else 0
    spill_bytes = ranks * moved if plan.offload == "file" else 0
    flops = sizes.flops_per_token * work.tokens
    read = _seconds(stored.nbytes, rates.disk)
    copy, spill = _seconds(copy_bytes, rates.copy), _seconds(spill_bytes, rates.disk)
    compute = _seconds(flops, rates.matmul)
    total = None
    if read is not None and copy is not None and spill is not None and compute is not None:
        steps = (read + spill, copy, compute)
        total = max(steps) if plan.stream else sum(steps)
    return Forecast(
        stored.nbytes, copy_bytes, spill_bytes, flops, read, copy, spill, compute, total
    )


def _seconds(amount: int, rate: Rate | None) -> float | None:
    """Seconds for an amount at a rate: 0 for nothing, None if the rate is not known."""
    if amount == 0:
        return 0.0
    return None if rate is None else amount / rate.per_second
