"""The decision at its boundaries: the last byte that fits, and the first that does not."""

from dataclasses import replace
from typing import Any

import pytest

from reap_driver.memory.batch_size import Footprint
from reap_driver.memory.decision import (
    PINNED_BYTES,
    READING_BYTES,
    Decision,
    Wanted,
    decide,
)
from reap_driver.memory.host_memory import Free
from reap_driver.memory.machine import Machine
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.memory.workload import Workload
from reap_kernels.errors import ResourceError

GB = 10**9
# Layers of 10, 20, 20 and 10 GB, and 5 GB of other weights; a token's state is 1 kB.
SIZES = ModelSizes(
    "Some", "bfloat16", (10 * GB, 20 * GB, 20 * GB, 10 * GB), 5 * GB, 0, 0, 1000, 0, 1000
)
WEIGHTS, PAIR, REST = 65 * GB, 40 * GB, 5 * GB
# 3000 sequences of 1000 tokens: states of 3 GB; a sequence's activations are 1 MB.
WORK = Workload(3_000_000, 1000, Footprint(held=1000, experts=0), full_batch=500)
STATES, ONE, FULL = 3 * GB, 10**6, 500 * 10**6


def cpu(host: int | None, disk: int = 100 * GB) -> Machine:
    free = None if host is None else Free(host, "by a test")
    return Machine("cpu", free, free, Free(disk, "on the disk of there"))


def gpu(device: int | None, host: int | None, disk: int = 100 * GB) -> Machine:
    frees = (None if n is None else Free(n, "by a test") for n in (device, host))
    return Machine("cuda:0", *frees, Free(disk, "on the disk of there"))


def tenths(need: int) -> int:
    """The smallest memory of which `need` is 90 %."""
    return -(-need * 10 // 9)


def made(machine: Machine, wanted: Wanted = "auto", **work: Any) -> Decision:
    return decide(wanted, SIZES, machine, replace(WORK, **work))


RESIDENT = WEIGHTS + READING_BYTES  # loading takes more than one sequence
STREAMED = REST + PAIR + READING_BYTES + ONE
LEAST_GPU = REST + PAIR + ONE

CASES = [
    (cpu(tenths(RESIDENT)), (False, None)),
    (cpu(tenths(RESIDENT) - 1), (True, "host")),
    (cpu(tenths(STREAMED + STATES)), (True, "host")),
    (cpu(tenths(STREAMED + STATES) - 1), (True, "file")),
    (cpu(STREAMED, tenths(2 * STATES)), (True, "file")),
    # Too little disk space: states stay in memory, up to the last byte.
    (cpu(STREAMED + STATES, tenths(2 * STATES) - 1), (True, "host")),
    (cpu(None), (False, None)),
    (gpu(tenths(WEIGHTS + ONE), tenths(RESIDENT)), (False, None)),
    (gpu(tenths(WEIGHTS + ONE) - 1, tenths(RESIDENT)), (True, "device")),
    # Everything that is loaded passes through host buffers.
    (gpu(tenths(WEIGHTS + ONE), tenths(PINNED_BYTES)), (False, None)),
    (gpu(tenths(WEIGHTS + ONE), tenths(PINNED_BYTES) - 1), (True, "device")),
    (gpu(tenths(REST + PAIR + STATES + FULL), PINNED_BYTES), (True, "device")),
    (gpu(tenths(REST + PAIR + STATES + FULL) - 1, 10 * GB), (True, "host")),
    (gpu(LEAST_GPU, tenths(PINNED_BYTES + STATES)), (True, "host")),
    (gpu(LEAST_GPU, tenths(PINNED_BYTES + STATES) - 1), (True, "file")),
    (gpu(LEAST_GPU, PINNED_BYTES + STATES, 0), (True, "host")),
    (gpu(LEAST_GPU + STATES, PINNED_BYTES, 0), (True, "device")),
    (gpu(None, None), (False, None)),
]


@pytest.mark.parametrize(("machine", "expected"), CASES)
def test_boundaries(machine: Machine, expected: tuple[bool, str | None]) -> None:
    found = made(machine)
    assert (found.stream, found.offload) == expected
    for need, free in (
        (found.device_bytes, machine.device_free),
        (found.host_bytes, machine.host_free),
    ):
        assert free is None or need <= free.nbytes
    assert found.file_bytes == (STATES if found.offload == "file" else 0)
    assert found.reasons


def test_what_is_held_where() -> None:
    host = dict(made(cpu(10**12), "always").host)
    assert sum(host.values()) == REST + PAIR + STATES + READING_BYTES + FULL
    on = made(gpu(10**12, 10**12), "always")
    assert (on.device_bytes, on.host_bytes) == (REST + PAIR + STATES + FULL, PINNED_BYTES)
    whole = made(gpu(10**12, 10**12))
    assert (whole.device_bytes, whole.host_bytes) == (WEIGHTS + FULL, PINNED_BYTES)


def test_always_streams_and_never_does_not() -> None:
    assert made(cpu(10**12), "always").stream
    exact = made(cpu(RESIDENT), "never")
    assert not exact.stream
    assert exact.host_bytes == RESIDENT


@pytest.mark.parametrize(
    ("machine", "wanted", "says"),
    [
        (
            cpu(RESIDENT - 1),
            "never",
            r"not fit resident \(`stream='never'`\): it needs 65.3 GB of host memory, weights "
            r"most of it \(65.0 GB\), and 65.3 GB is free \(by a test\); try `stream='auto'`",
        ),
        (
            cpu(STREAMED - 1),
            "auto",
            r"even streamed layer by layer: it needs 45.3 GB of host memory, two layers most of it "
            r"\(40.0 GB\), and 45.3 GB is free \(by a test\); use a machine with more memory",
        ),
        (
            cpu(STREAMED + STATES - 1, tenths(2 * STATES) - 1),
            "always",
            r"needs 6.00 GB of disk, hidden states most of it .* 6.67 GB is free \(on the disk of "
            r"there\); use less data \(`data` with SOURCE:N\)",
        ),
        (gpu(LEAST_GPU - 1, 10 * GB), "auto", r"needs 45.0 GB of device memory, two layers most"),
        (gpu(LEAST_GPU, PINNED_BYTES - 1), "auto", r"537 MB of host memory, buffers most of it"),
    ],
)
def test_what_does_not_fit_is_refused(machine: Machine, wanted: Wanted, says: str) -> None:
    with pytest.raises(ResourceError, match=says):
        made(machine, wanted)


def test_remedies_follow_the_largest_need() -> None:
    wide = replace(SIZES, dtype="float32")
    with pytest.raises(ResourceError, match=r"a machine with more memory, or `dtype='bfloat16'`"):
        decide("auto", wide, cpu(GB), WORK)
    with pytest.raises(ResourceError, match=r"activations most of it .* a smaller `batch_size` or"):
        made(cpu(10**11), footprint=Footprint(10**8, 0))


def test_the_batch_is_what_memory_allows() -> None:
    """Half of the remaining memory is used; a requested size is kept, or refused."""
    left = cpu(tenths(STREAMED + STATES + GB))
    free = tenths(STREAMED + STATES + GB) - (STREAMED - ONE) - STATES
    assert made(left, footprint=Footprint(10**6, 0)).batch_size == free // 2 // 10**9
    assert made(left).batch_size == 500
    assert made(left, full_batch=7, fixed=True).batch_size == 7
    with pytest.raises(ResourceError, match="activations"):
        made(left, footprint=Footprint(10**6, 0), full_batch=2000, fixed=True)


def test_lines_and_facts_tell_the_same() -> None:
    found = made(cpu(tenths(STREAMED + STATES) - 1))
    text = " ".join("\n".join(found.lines()).split())
    assert "decision stream layers, offload states to: file" in text
    assert "resident needs 65.3 GB of host memory, more than 90% of the 53.6 GB" in text
    assert "all but layers 5.00 GB + two layers 40.0 GB + buffers 268 MB" in text
    assert "file 3.00 GB of hidden states" in text
    facts = found.facts()
    assert facts["host_bytes"] == sum(facts["host_parts"].values()) == found.host_bytes
    assert (facts["stream"], facts["offload"], facts["file_bytes"]) == (True, "file", STATES)
