"""How to hold a model: whole, or one decoder layer at a time, and where states wait meanwhile.

A pure function of sizes, of what a machine has free and of the work, so that the same arguments
decide alike, whether they are measured or made up.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from reap_driver.base.units import in_bytes, row
from reap_driver.memory.batch_size import Footprint
from reap_driver.memory.host import Free
from reap_driver.memory.machine import Machine
from reap_driver.memory.model_sizes import ModelSizes
from reap_kernels.errors import ResourceError

Wanted = Literal["auto", "always", "never"]
Park = Literal["device", "host", "file"]
Parts = tuple[tuple[str, int], ...]

# Share of free memory a choice may rely on where there is another: activations are estimates,
# allocators leave holes, and other programs want memory too.
SHARE = 0.9
# What layers are read into: on a GPU's host pinned, and twice, so that copies need not wait.
READING_BYTES = 256 << 20
PINNED_BYTES = 512 << 20

WEIGHTS, REST, PAIR = "weights", "all but layers", "two layers"
STATES, ACTIVATIONS, READING = "parked states", "activations", "buffers"


@dataclass(frozen=True)
class Workload:
    """What is to run.

    Attributes:
        tokens: of all data.
        seq_len: tokens in a sequence.
        footprint: of a token's activations.
        full_batch: sequences at a time that keep the processor busy, or those asked for.
        fixed: whether they were asked for; else fewer are run where memory is short.
    """

    tokens: int
    seq_len: int
    footprint: Footprint
    full_batch: int
    fixed: bool = False

    @property
    def smallest_batch(self) -> int:
        """Sequences below which there is no way to go."""
        return self.full_batch if self.fixed else 1

    def batch(self, free: int | None) -> int:
        """Sequences to run at a time with `free` bytes beside the model."""
        if self.fixed or free is None:
            return self.smallest_batch
        fitting = self.footprint.tokens_within(max(0, free)) // self.seq_len
        return max(1, min(self.full_batch, fitting))

    def activations(self, batch: int, free: int | None) -> int:
        """Bytes a batch takes at most where `free` are free beside the model."""
        tokens = min(batch * self.seq_len, self.tokens)
        limit = 4 * self.footprint.experts * tokens if free is None else max(0, free)
        return self.footprint.nbytes(tokens, limit)


@dataclass(frozen=True)
class Decision:
    """How a model is held, and what that takes. On a CPU all memory is the host's.

    Attributes:
        stream: whether decoder layers come one at a time.
        park: where states wait between layers; None where they do not: the model is resident.
        batch_size: sequences at a time.
        device: (part, bytes) of the device's memory at the peak.
        host: (part, bytes) of main memory at the peak.
        file_bytes: of states in a file.
        reasons: why, in words.
    """

    stream: bool
    park: Park | None
    batch_size: int
    device: Parts
    host: Parts
    file_bytes: int
    reasons: tuple[str, ...]

    @property
    def device_bytes(self) -> int:
        """Peak of the device's memory."""
        return sum(nbytes for _, nbytes in self.device)

    @property
    def host_bytes(self) -> int:
        """Peak of main memory."""
        return sum(nbytes for _, nbytes in self.host)

    def lines(self) -> list[str]:
        """What a human reads: the decision, why, and what it takes where."""
        how = f"stream layers, park states: {self.park}" if self.stream else "resident"
        return [
            row("decision", f"{how}; {self.batch_size} sequences at a time"),
            *(row("", reason) for reason in self.reasons),
            *(row(where, text) for where, text in self.needs()),
        ]

    def needs(self) -> Iterator[tuple[str, str]]:
        """(memory, what it holds at the peak) of each, in words."""
        for where, parts in (("device", self.device), ("host", self.host)):
            if parts:
                total = sum(nbytes for _, nbytes in parts)
                listed = " + ".join(f"{name} {in_bytes(nbytes)}" for name, nbytes in parts)
                yield where, f"{in_bytes(total)} = {listed}"
        if self.file_bytes:
            yield "file", f"{in_bytes(self.file_bytes)} of {STATES}"

    def facts(self) -> dict[str, Any]:
        """The same for JSON; bytes."""
        return {
            "stream": self.stream,
            "park": self.park,
            "batch_size": self.batch_size,
            "device_bytes": self.device_bytes,
            "device_parts": dict(self.device),
            "host_bytes": self.host_bytes,
            "host_parts": dict(self.host),
            "file_bytes": self.file_bytes,
            "reasons": list(self.reasons),
        }


def decide(wanted: Wanted, sizes: ModelSizes, machine: Machine, work: Workload) -> Decision:
    """Chooses whether to stream, and where states wait.

    `auto` keeps the model resident where that takes at most `SHARE` of what is free, and where the
    system does not say what is free. States wait on the device where a full batch fits beside them,
    else on the host, else in a file.

    Args:
        wanted: "auto", "always" or "never" to stream.
        sizes: of the model.
        machine: what is free before it is loaded.
        work: what is to run.

    Raises:
        ResourceError: it does not fit as wanted; names the largest need, what is free, the remedy.
    """
    whole = resident(sizes, machine, work, full=False)
    if wanted == "never":
        _refuse(whole, machine, "resident (--stream never)", "try --stream auto")
        why = "asked for by --stream never"
        return replace(resident(sizes, machine, work), reasons=(why,))
    if wanted == "auto" and _fits(whole, machine, SHARE, SHARE):
        return replace(resident(sizes, machine, work), reasons=(_fitting(whole, machine),))
    why = "asked for by --stream always" if wanted == "always" else _lacking(whole, machine)
    for park, full, device_share, host_share in _places(machine):
        plan = streamed(sizes, machine, work, park, full=full)
        if _fits(plan, machine, device_share, host_share):
            chosen = streamed(sizes, machine, work, park)
            return replace(chosen, reasons=(why, _parked(plan, machine)))
    least = streamed(sizes, machine, work, "file", full=False)
    remedy = "use a machine with more memory"
    if sizes.dtype == "float32":
        remedy += ", or --dtype bfloat16"
    _refuse(least, machine, "even streamed layer by layer", remedy)
    raise AssertionError("a plan that fits was not chosen")


def resident(
    sizes: ModelSizes, machine: Machine, work: Workload, *, full: bool | None = None
) -> Decision:
    """The whole model in memory, whether or not it fits.

    Loading places layer by layer where the model computes, through the same buffers as streaming.

    Args: see `streamed`.
    """
    free = _left(_core(machine), sizes.weight_bytes)
    batch = _batch(work, free, full)
    active = (ACTIVATIONS, work.activations(batch, free))
    weights = (WEIGHTS, sizes.weight_bytes)
    if machine.accelerated:
        return Decision(False, None, batch, (weights, active), ((READING, PINNED_BYTES),), 0, ())
    # Buffers are gone when batches run.
    peak = max(active, (READING, READING_BYTES), key=lambda part: part[1])
    return Decision(False, None, batch, (), (weights, peak), 0, ())


def streamed(
    sizes: ModelSizes, machine: Machine, work: Workload, park: Park, *, full: bool | None = None
) -> Decision:
    """One decoder layer at a time with the next one coming, whether or not it fits.

    Args:
        sizes: of the model.
        machine: what is free.
        work: what is to run.
        park: where states wait.
        full: True for a full batch, False for the smallest, None for what memory allows.
    """
    states = work.tokens * sizes.state_bytes
    waiting = ((STATES, states),)
    core: Parts = ((REST, sizes.rest_bytes), (PAIR, sizes.largest_pair))
    buffers: Parts = ((READING, PINNED_BYTES if machine.accelerated else READING_BYTES),)
    if park == "device" or (park == "host" and not machine.accelerated):
        core += waiting
    elif park == "host":
        buffers += waiting
    if not machine.accelerated:
        core, buffers = core + buffers, ()
    free = _left(_core(machine), sum(nbytes for _, nbytes in core))
    batch = _batch(work, free, full)
    core += ((ACTIVATIONS, work.activations(batch, free)),)
    device, host = (core, buffers) if machine.accelerated else ((), core)
    return Decision(True, park, batch, device, host, states if park == "file" else 0, ())


def _places(machine: Machine) -> Iterator[tuple[Park, bool, float, float]]:
    """(park, whether for a full batch, shares of device and host to rely on), best first."""
    if machine.accelerated:
        yield "device", True, SHARE, 1.0
    yield "host", False, 1.0, SHARE
    yield "file", False, 1.0, 1.0
    yield "host", False, 1.0, 1.0
    if machine.accelerated:
        yield "device", False, 1.0, 1.0


def _core(machine: Machine) -> Free | None:
    """The memory the model computes in."""
    return machine.device_free if machine.accelerated else machine.host_free


def _batch(work: Workload, free: int | None, full: bool | None) -> int:
    """Sequences at a time: all wanted, the fewest, or what memory allows."""
    if full is None:
        return work.batch(free)
    return work.full_batch if full else work.smallest_batch


def _left(free: Free | None, held: int) -> int | None:
    return None if free is None else free.nbytes - held


def _needs(plan: Decision, machine: Machine) -> Iterator[tuple[str, Parts, Free | None]]:
    """(memory or disk, what is needed of it, what is free)."""
    if plan.device:
        yield "device memory", plan.device, machine.device_free
    if plan.host:
        yield "host memory", plan.host, machine.host_free
    if plan.file_bytes:
        disk = Free(machine.disk_free, f"on the disk of {machine.disk}")
        # Those of one layer are read while those of the next are written.
        yield "disk", ((STATES, 2 * plan.file_bytes),), disk


def _fits(plan: Decision, machine: Machine, device_share: float, host_share: float) -> bool:
    shares = {"device memory": device_share, "host memory": host_share, "disk": SHARE}
    return all(
        free is None or sum(nbytes for _, nbytes in parts) <= shares[where] * free.nbytes
        for where, parts, free in _needs(plan, machine)
    )


def _refuse(plan: Decision, machine: Machine, how: str, remedy: str) -> None:
    """Raise where a plan does not fit."""
    for where, parts, free in _needs(plan, machine):
        total = sum(nbytes for _, nbytes in parts)
        share = SHARE if where == "disk" else 1.0
        if free is None or total <= share * free.nbytes:
            continue
        name, largest = max(parts, key=lambda part: part[1])
        if name == ACTIVATIONS:
            remedy = "use a smaller --batch-size or --seq-len"
        elif name == STATES:
            remedy = "use less data (--data SOURCE:N), or free some space there"
        raise ResourceError(
            f"the model does not fit {how}: it needs {in_bytes(total)} of {where}, "
            f"{name} most of it ({in_bytes(largest)}), and {in_bytes(free.nbytes)} is free "
            f"({free.bound}); {remedy}"
        )


def _lacking(plan: Decision, machine: Machine) -> str:
    """Which memory is too small for a resident model."""
    for where, parts, free in _needs(plan, machine):
        total = sum(nbytes for _, nbytes in parts)
        if free is not None and total > SHARE * free.nbytes:
            return (
                f"resident needs {in_bytes(total)} of {where}, more than {SHARE:.0%} of the "
                f"{in_bytes(free.nbytes)} that is free ({free.bound})"
            )
    raise AssertionError("nothing is lacking")


def _fitting(plan: Decision, machine: Machine) -> str:
    """What a resident model takes of what is free."""
    said = []
    for where, parts, free in _needs(plan, machine):
        total = in_bytes(sum(nbytes for _, nbytes in parts))
        there = "an unknown amount" if free is None else in_bytes(free.nbytes)
        said.append(f"needs {total} of {where}, {there} is free")
    return "; ".join(said)


def _parked(plan: Decision, machine: Machine) -> str:
    """Where states wait, and why there."""
    states = dict(plan.device + plan.host).get(STATES, plan.file_bytes)
    why = {
        "device": "they fit there beside a full batch" if machine.accelerated else "",
        "host": "they do not fit the device beside a full batch" if machine.accelerated else "",
        "file": "they fit no memory",
    }[plan.park or "file"]
    where = "in a file" if plan.park == "file" else f"on the {plan.park}"
    return f"states of {in_bytes(states)} wait {where}" + (f": {why}" if why else "")
