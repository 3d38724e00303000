"""Decides whether a model is resident or streamed by decoder layer, and where its hidden states go.

`decide` is a pure function of the model's sizes, the machine's free memory and the workload.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from reap_driver.base.units import in_bytes, row
from reap_driver.memory.host_memory import Free
from reap_driver.memory.machine import Machine
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.memory.workload import Workload
from reap_kernels.errors import ResourceError

Wanted = Literal["auto", "always", "never"]
Offload = Literal["device", "host", "file"]
Parts = tuple[tuple[str, int], ...]

# Share of the free memory that a choice may use as long as there is another choice: activations are
# estimates, allocators fragment, and other programs allocate too.
SHARE = 0.9
# Buffers that layers are read into. With a GPU they are pinned, and there are two, so that reading
# and copying overlap.
READING_BYTES = 256 << 20
PINNED_BYTES = 512 << 20

WEIGHTS, REST, PAIR = "weights", "all but layers", "two layers"
STATES, ACTIVATIONS, READING = "hidden states", "activations", "buffers"
GRAMS, GRAM, GRAM_FILE = "Gram matrices", "a layer's Gram matrices", "their file"


@dataclass(frozen=True)
class Decision:
    """How a model runs, and the memory that takes. On a CPU all memory is host memory.

    Attributes:
        stream: whether decoder layers are loaded one at a time.
        offload: where hidden states are stored between layers; None for a resident model.
        batch_size: sequences per batch.
        device: (part, bytes) of the device memory at the peak.
        host: (part, bytes) of the host memory at the peak.
        file_bytes: bytes of the hidden states in files.
        reasons: the reasons for the decision, in words.
    """

    stream: bool
    offload: Offload | None
    batch_size: int
    device: Parts
    host: Parts
    file_bytes: int
    reasons: tuple[str, ...]

    @property
    def device_bytes(self) -> int:
        """Peak device memory in bytes."""
        return sum(nbytes for _, nbytes in self.device)

    @property
    def host_bytes(self) -> int:
        """Peak host memory in bytes."""
        return sum(nbytes for _, nbytes in self.host)

    def lines(self) -> list[str]:
        """The decision, its reasons and its memory, as lines of text."""
        how = f"stream layers, offload states to: {self.offload}" if self.stream else "resident"
        return [
            row("decision", f"{how}; {self.batch_size} sequences per batch"),
            *(row("", reason) for reason in self.reasons),
            *(row(where, text) for where, text in self.needs()),
        ]

    def needs(self) -> Iterator[tuple[str, str]]:
        """(kind of memory, its use at the peak in words) for each kind in use."""
        for where, parts in (("device", self.device), ("host", self.host)):
            if parts:
                total = sum(nbytes for _, nbytes in parts)
                listed = " + ".join(f"{name} {in_bytes(nbytes)}" for name, nbytes in parts)
                yield where, f"{in_bytes(total)} = {listed}"
        if self.file_bytes:
            yield "file", f"{in_bytes(self.file_bytes)} of {STATES}"

    def facts(self) -> dict[str, Any]:
        """The decision as JSON values; sizes are in bytes."""
        return {
            "stream": self.stream,
            "offload": self.offload,
            "batch_size": self.batch_size,
            "device_bytes": self.device_bytes,
            "device_parts": dict(self.device),
            "host_bytes": self.host_bytes,
            "host_parts": dict(self.host),
            "file_bytes": self.file_bytes,
            "reasons": list(self.reasons),
        }


def decide(wanted: Wanted, sizes: ModelSizes, machine: Machine, work: Workload) -> Decision:
    """Decides whether to stream, and where hidden states are stored between layers.

    `auto` keeps the model resident if that takes at most `SHARE` of the free memory, or if the
    system does not report its free memory. Hidden states stay on the device if a full batch fits
    beside them, else they are offloaded to the host, else to files.

    Args:
        wanted: whether to stream: "auto", "always" or "never".
        sizes: sizes of the model.
        machine: memory that is free before the model is loaded.
        work: the work to be done.

    Raises:
        ResourceError: the model does not fit; names the largest part, the free memory and a remedy.
    """
    whole = resident(sizes, machine, work, full=False)
    if wanted == "never":
        _refuse(whole, machine, "resident (`stream='never'`)", "try `stream='auto'`")
        why = "requested with `stream='never'`"
        return replace(resident(sizes, machine, work), reasons=(why,))
    if wanted == "auto" and _fits(whole, machine, SHARE, SHARE):
        return replace(resident(sizes, machine, work), reasons=(_fitting(whole, machine),))
    why = "requested with `stream='always'`" if wanted == "always" else _lacking(whole, machine)
    for offload, full, device_share, host_share in _places(machine):
        plan = streamed(sizes, machine, work, offload, full=full)
        if _fits(plan, machine, device_share, host_share):
            chosen = streamed(sizes, machine, work, offload)
            return replace(chosen, reasons=(why, _offload_reason(plan, machine)))
    least = streamed(sizes, machine, work, "file", full=False)
    remedy = "use a machine with more memory"
    if sizes.dtype == "float32":
        remedy += ", or `dtype='bfloat16'`"
    _refuse(least, machine, "even streamed layer by layer", remedy)
    raise AssertionError("a plan that fits was not chosen")


def resident(
    sizes: ModelSizes, machine: Machine, work: Workload, *, full: bool | None = None
) -> Decision:
    """The memory of a resident model, whether or not it fits.

    Loading copies layer by layer to the device through the same buffers as streaming.

    Args: see `streamed`.
    """
    core = ((WEIGHTS, sizes.weight_bytes), *_parts(GRAMS, sum(work.grams)))
    free = _left(_core(machine), sum(nbytes for _, nbytes in core))
    batch = _batch(work, free, full)
    active = (ACTIVATIONS, work.activations(batch, free))
    file = _parts(GRAM_FILE, max(work.grams, default=0))
    if machine.accelerated:
        host = ((READING, PINNED_BYTES), *file)
        return Decision(False, None, batch, (*core, active), host, 0, ())
    # The buffers are freed before the first batch runs.
    peak = max(active, (READING, READING_BYTES), key=lambda part: part[1])
    return Decision(False, None, batch, (), (*core, peak, *file), 0, ())


def streamed(
    sizes: ModelSizes,
    machine: Machine,
    work: Workload,
    offload: Offload,
    *,
    full: bool | None = None,
) -> Decision:
    """The memory of a streamed model, whether or not it fits.

    One decoder layer is in use while the next one is loaded.

    Args:
        sizes: sizes of the model.
        machine: its free memory.
        work: the work to be done.
        offload: where hidden states are stored between layers.
        full: True for a full batch, False for the smallest, None for the largest that fits.
    """
    states = work.tokens * sizes.state_bytes
    waiting = ((STATES, states),)
    gram = max(work.grams, default=0)
    core: Parts = ((REST, sizes.rest_bytes), (PAIR, sizes.largest_pair), *_parts(GRAM, gram))
    buffers: Parts = ((READING, PINNED_BYTES if machine.accelerated else READING_BYTES),)
    buffers += _parts(GRAM_FILE, gram)
    if offload == "device" or (offload == "host" and not machine.accelerated):
        core += waiting
    elif offload == "host":
        buffers += waiting
    if not machine.accelerated:
        core, buffers = core + buffers, ()
    free = _left(_core(machine), sum(nbytes for _, nbytes in core))
    batch = _batch(work, free, full)
    core += ((ACTIVATIONS, work.activations(batch, free)),)
    device, host = (core, buffers) if machine.accelerated else ((), core)
    return Decision(True, offload, batch, device, host, states if offload == "file" else 0, ())


def _parts(name: str, nbytes: int) -> Parts:
    """A part of the memory where there is any."""
    return ((name, nbytes),) if nbytes else ()


def _places(machine: Machine) -> Iterator[tuple[Offload, bool, float, float]]:
    """(offload, whether a full batch must fit, usable shares of device and host), best first."""
    if machine.accelerated:
        yield "device", True, SHARE, 1.0
    yield "host", False, 1.0, SHARE
    yield "file", False, 1.0, 1.0
    yield "host", False, 1.0, 1.0
    if machine.accelerated:
        yield "device", False, 1.0, 1.0


def _core(machine: Machine) -> Free | None:
    """Free memory of the device that the model runs on."""
    return machine.device_free if machine.accelerated else machine.host_free


def _batch(work: Workload, free: int | None, full: bool | None) -> int:
    """Sequences per batch: full, smallest, or what fits in `free` bytes."""
    if full is None:
        return work.batch(free)
    return work.full_batch if full else work.smallest_batch


def _left(free: Free | None, held: int) -> int | None:
    """Bytes that remain free."""
    return None if free is None else free.nbytes - held


def _needs(plan: Decision, machine: Machine) -> Iterator[tuple[str, Parts, Free | None]]:
    """(kind of memory, (part, bytes) needed, free) for each kind that is needed."""
    if plan.device:
        yield "device memory", plan.device, machine.device_free
    if plan.host:
        yield "host memory", plan.host, machine.host_free
    if plan.file_bytes:
        # The states of one layer are read while those of the next are written.
        yield "disk", ((STATES, 2 * plan.file_bytes),), machine.disk_free


def _fits(plan: Decision, machine: Machine, device_share: float, host_share: float) -> bool:
    shares = {"device memory": device_share, "host memory": host_share, "disk": SHARE}
    return all(
        free is None or sum(nbytes for _, nbytes in parts) <= shares[where] * free.nbytes
        for where, parts, free in _needs(plan, machine)
    )


def _refuse(plan: Decision, machine: Machine, how: str, remedy: str) -> None:
    """Raises ResourceError if a plan does not fit."""
    for where, parts, free in _needs(plan, machine):
        total = sum(nbytes for _, nbytes in parts)
        share = SHARE if where == "disk" else 1.0
        if free is None or total <= share * free.nbytes:
            continue
        name, largest = max(parts, key=lambda part: part[1])
        if name == ACTIVATIONS:
            remedy = "use a smaller `batch_size` or `seq_len`"
        elif name == STATES:
            remedy = "use less data (`data` with SOURCE:N), or free some space there"
        raise ResourceError(
            f"the model does not fit {how}: it needs {in_bytes(total)} of {where}, "
            f"{name} most of it ({in_bytes(largest)}), and {in_bytes(free.nbytes)} is free "
            f"({free.bound}); {remedy}"
        )


def _lacking(plan: Decision, machine: Machine) -> str:
    """Why a resident model does not fit, in words."""
    for where, parts, free in _needs(plan, machine):
        total = sum(nbytes for _, nbytes in parts)
        if free is not None and total > SHARE * free.nbytes:
            return (
                f"resident needs {in_bytes(total)} of {where}, more than {SHARE:.0%} of the "
                f"{in_bytes(free.nbytes)} that is free ({free.bound})"
            )
    raise AssertionError("nothing is lacking")


def _fitting(plan: Decision, machine: Machine) -> str:
    """Why a resident model fits, in words."""
    said = []
    for where, parts, free in _needs(plan, machine):
        total = in_bytes(sum(nbytes for _, nbytes in parts))
        there = "an unknown amount" if free is None else in_bytes(free.nbytes)
        said.append(f"needs {total} of {where}, {there} is free")
    return "; ".join(said)


def _offload_reason(plan: Decision, machine: Machine) -> str:
    """Where hidden states are stored and why, in words."""
    states = dict(plan.device + plan.host).get(STATES, plan.file_bytes)
    why = {
        "device": "they fit there beside a full batch" if machine.accelerated else "",
        "host": "they do not fit on the device beside a full batch" if machine.accelerated else "",
        "file": "they do not fit in memory",
    }[plan.offload or "file"]
    where = "in files" if plan.offload == "file" else f"on the {plan.offload}"
    return f"{in_bytes(states)} of hidden states {where}" + (f": {why}" if why else "")
