"""What is recorded of the hardware: names of models and sizes, and nothing that names a machine."""

import platform
from types import SimpleNamespace

import pytest
import torch

import reap_driver as rd
from reap_driver.observation.data_parallel import Ranks
from reap_driver.planning.public_provenance import observation
from reap_driver.workflow.hardware import hardware
from reap_kernels.errors import DataError
from reap_kernels.provenance import OBSERVED
from reap_kernels.schema import Mismatch

H200 = SimpleNamespace(name="NVIDIA H200", total_memory=150_754_820_096)


def test_a_cpu() -> None:
    found = hardware(rd.RunOptions(device="cpu"), Ranks())
    OBSERVED.check(found, "observed")
    assert (found["devices"], found["threads"]) == (1, torch.get_num_threads())
    assert found["device"]
    assert platform.node() not in found["device"]


@pytest.mark.parametrize(
    ("options", "world", "number"),
    [({}, Ranks(), 1), ({}, Ranks(1, 4), 4), ({"device_map": "auto"}, Ranks(), 8)],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], world: Ranks, number: int
) -> None:
    """One for each rank, or all that a map may use."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: H200)
    found = hardware(rd.RunOptions(**options), world)
    OBSERVED.check(found, "observed")
    said = observation({**found, "seconds": 90_000, "seed": -3})
    many, each = ("", "") if number == 1 else (f"{number} x ", " each")
    assert said == {
        "observed on": f"{many}NVIDIA H200, 151 GB of memory{each}",
        "observed in": "1 day 1 h",
        "seed of the samples": "-3",
    }


def test_what_is_not_recorded_is_not_said() -> None:
    assert observation({}) == {}
    assert observation({"device": "A", "memory_bytes": None}) == {"observed on": "A"}


def test_a_file_with_other_values_is_refused() -> None:
    with pytest.raises(Mismatch):
        OBSERVED.check({"seconds": "long"}, "observed")
    stats = rd.SaliencyStats({}, ["a"], {"observed": {"devices": -1}})
    with pytest.raises(DataError):
        stats.save("never")
