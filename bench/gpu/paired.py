"""Whether one of two variants is faster, from times taken in turn, and how large the noise is.

Times that one variant takes in a block say little about another's: in the rows of the stage `layer`
the same code differs from itself by up to 15 %. A block meets the clock, the power budget and the
contents of caches that whatever ran before it left. So variants run one call at a time, in rounds
of random order; only times of one round are compared, as logarithms of ratios, whose median and its
interval a bootstrap of rounds gives. A variant that is there twice states the noise: what differs
by less is no difference.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.gpu.clock import Deadline, busy

# Of an interval: a run compares dozens of pairs, of which one in a hundred may mislead.
CONFIDENCE = 0.99
RESAMPLES = 2000
# Seconds of calls between two waits for the device.
_BATCH = 0.2


@dataclass(frozen=True)
class Effect:
    """A ratio of times, and the interval that holds it with `CONFIDENCE`."""

    ratio: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """How far from 1 the interval reaches, as a logarithm."""
        return max(abs(math.log(self.low)), abs(math.log(self.high)))

    def verdict(self, first: str, second: str, noise: float) -> str:
        """`first` or `second`, whichever is faster by more than the noise; else `no difference`.
        The ratio is the first's time over the second's.
        """
        if abs(math.log(self.ratio)) <= noise or self.low <= 1 <= self.high:
            return "no difference"
        return first if self.ratio < 1 else second


def effect(logarithms: Sequence[float]) -> Effect:
    """The median ratio of paired times, from one logarithm a round; the same for the same input."""
    values = torch.tensor(logarithms, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=rng)
    medians = values[drawn].quantile(0.5, dim=1)
    edges = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = medians.quantile(edges).exp().tolist()
    return Effect(math.exp(statistics.median(logarithms)), low, high)


@dataclass(frozen=True)
class Times:
    """Seconds of every round, by variant: of the device, and of the host until it had queued a
    call.
    """

    device: dict[str, list[float]]
    host: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        """How many rounds were timed."""
        return len(next(iter(self.device.values())))


def interleaved(
    calls: Mapping[str, Sequence[Callable[[], object]]],
    device: torch.device,
    rounds: int,
    deadline: Deadline,
) -> Times:
    """Times every variant once per round, in random order, until a deadline.

    Args:
        calls: by variant, one call for each input set; successive calls take successive sets, so
            that none finds its input in the cache.
        device: where they run.
        rounds: how many at most.
        deadline: after it no further rounds are queued.
    """
    found = Times({name: [] for name in calls}, {name: [] for name in calls})
    rng, turn = random.Random(0), 0
    began = time.perf_counter()
    for _ in range(2 if device.type == "cuda" else 1):  # the first time compiles
        began = time.perf_counter()
        for own in calls.values():
            own[0]()
        _wait(device)
    each = time.perf_counter() - began  # tells how many rounds a batch may have
    batch = max(1, int(_BATCH / each))
    while found.rounds < rounds and not (found.rounds and deadline.passed()):
        orders = [rng.sample(sorted(calls), len(calls)) for _ in range(batch)]
        turn = _queued(calls, orders[: rounds - found.rounds], device, turn, found)
    return found


def _queued(
    calls: Mapping[str, Sequence[Callable[[], object]]],
    orders: list[list[str]],
    device: torch.device,
    turn: int,
    found: Times,
) -> int:
    """Queues rounds without waiting, then adds their times; returns the number of calls so far."""
    cuda = device.type == "cuda"
    names = [name for order in orders for name in order]
    if cuda:
        calls[names[0]][turn % len(calls[names[0]])]()  # the first finds an idle device
        busy(device)
    marks, host = [_mark(cuda)], []
    for name in names:
        turn += 1
        began = time.perf_counter()
        calls[name][turn % len(calls[name])]()
        host.append(time.perf_counter() - began)
        marks.append(_mark(cuda))
    _wait(device)
    for at, (name, seconds) in enumerate(zip(names, host, strict=True)):
        before, after = marks[at], marks[at + 1]
        if isinstance(before, float):
            found.device[name].append(after - before)
        else:
            found.device[name].append(before.elapsed_time(after) / 1e3)
        found.host[name].append(seconds)
    return turn + 1


def _mark(cuda: bool) -> "float | torch.cuda.Event":
    """A moment between calls."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
