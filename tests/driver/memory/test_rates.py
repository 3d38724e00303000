"""Rates are those of the bytes read and the products computed; the forecast uses them."""

import os
import time
from pathlib import Path

import pytest
import torch

from reap_driver.base.units import in_bytes, short
from reap_driver.memory import rates
from reap_driver.memory.batch_size import Footprint
from reap_driver.memory.checkpoint_size import CheckpointSize
from reap_driver.memory.decision import Decision
from reap_driver.memory.forecast import forecast
from reap_driver.memory.model_sizes import ModelSizes
from reap_driver.memory.rates import Rate, Rates
from reap_driver.memory.workload import Workload


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads at most the limit, and reports whether the page cache served it."""
    file = tmp_path / "w.safetensors"
    file.write_bytes(os.urandom(20_000_000))
    found = rates.disk_rate(file, most=10_000_000)
    assert found.per_second > 0
    assert found.how.startswith("10 MB of w.safetensors from ")

    def busy(*_: object) -> int:
        raise BlockingIOError

    def unknown(*_: object) -> int:
        raise OSError(95, "not supported")

    for answer, words in (
        (lambda *_: 1, "from the page cache, not the disk"),
        (busy, "from the disk"),
        (unknown, "the system does not say which"),
    ):
        monkeypatch.setattr("os.preadv", answer)
        assert rates.disk_rate(file).how.endswith(words)


def test_matmul() -> None:
    cpu = torch.device("cpu")
    began = time.perf_counter()
    found = rates.measure(cpu, torch.float32, None)
    took = time.perf_counter() - began
    assert (found.disk, found.copy) == (None, None)
    # Of one product of several, which therefore took less than all this.
    assert 2 * 1024**3 / took < found.matmul.per_second < 1e14
    assert "float32 product of 1024 x 1024 on cpu" in found.matmul.how


SIZES = ModelSizes("Some", "bfloat16", (10,) * 4, 10, 0, 0, 8, flops_per_token=3, state_bytes=2)
WORK = Workload(100, 8, Footprint(1, 1), 1)
MEASURED = Rates(Rate(5.0, ""), Rate(10.0, ""), Rate(2.0, ""))


def plan(*, stream: bool, offload: str | None, device: int) -> Decision:
    return Decision(stream, offload, 1, (("weights", device),) if device else (), (), 0, ())


@pytest.mark.parametrize(
    ("chosen", "copied", "spilled", "seconds"),
    [
        # 20 B at 5 B/s, 300 operations at 2 per second; states of 200 B are copied 2 * 4 times.
        (plan(stream=False, offload=None, device=0), 0, 0, 4 + 150),
        (plan(stream=True, offload="host", device=0), 0, 0, 150),
        (plan(stream=True, offload="file", device=0), 0, 1600, 4 + 320),
        (plan(stream=True, offload="device", device=1), 50, 0, 150),
        (plan(stream=True, offload="host", device=1), 1650, 0, 165),
        (plan(stream=False, offload=None, device=1), 50, 0, 4 + 5 + 150),
    ],
)
def test_forecast(chosen: Decision, copied: int, spilled: int, seconds: float) -> None:
    stored = CheckpointSize(20, "headers", "fp8")
    found = forecast(chosen, SIZES, stored, WORK, MEASURED)
    assert (found.copy_bytes, found.spill_bytes, found.seconds) == (copied, spilled, seconds)
    unmeasured = forecast(chosen, SIZES, stored, WORK, Rates(None, MEASURED.copy, MEASURED.matmul))
    assert (unmeasured.read_seconds, unmeasured.seconds) == (None, None)
    assert unmeasured.compute_seconds == 150


def test_units() -> None:
    sizes = (0, 999, 1000, 9994, 9996, 99_960, 999_600, 1_030_000_000_000)
    assert [in_bytes(n) for n in sizes] == [
        *("0 B", "999 B", "1.00 kB", "9.99 kB", "10.0 kB", "100 kB", "1.00 MB", "1.03 TB"),
    ]
    assert [short(n) for n in (7, 1.234e6, 6.27e15)] == ["7", "1.23M", "6.27P"]
    assert short(3.29e10, "kMBT") == "32.9B"
