"""Clock, power and throttling as columns, by a pretended NVML; and files that get new columns."""

import csv
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import rows
from bench.gpu.machine import survey
from bench.gpu.nvml import COLUMNS, Watch, Window

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def nvml(monkeypatch) -> SimpleNamespace:
    """One GPU at 1,500 MHz and 600 W whose power cap holds it back."""
    module = SimpleNamespace(
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1500,
        nvmlDeviceGetPowerUsage=lambda handle: 600_000,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x04,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    found = SimpleNamespace(uuid="1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return module


def test_columns_are_of_the_windows_alone(nvml: SimpleNamespace) -> None:
    watch, windows, other = Watch(GPU), [], []
    assert watch.note == "sampled every 5 ms"
    with watch.window(windows):
        while len(watch._samples) < 4:
            time.sleep(0.001)
    nvml.nvmlDeviceGetClockInfo = lambda handle, kind: 900
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x01
    before = len(watch._samples)
    with watch.window(other):
        while len(watch._samples) < before + 3:
            time.sleep(0.001)
    first = {"sm_mhz": "1500", "watts": "600", "throttled": "power cap 100 %"}
    assert watch.columns(windows) == first
    assert watch.columns(other) == {"sm_mhz": "900", "watts": "600", "throttled": "no"}
    assert set(first) == set(COLUMNS)
    assert watch.columns([]) == dict.fromkeys(COLUMNS, "")


def test_its_absence_is_said(monkeypatch, nvml: SimpleNamespace) -> None:
    windows: list[Window] = []
    watch = pickle.loads(pickle.dumps(Watch(CPU)))  # as it goes to the process of the queue
    with watch.window(windows):
        pass
    assert (watch.note, watch.columns(windows)) == ("no CUDA device", dict.fromkeys(COLUMNS, ""))

    def refuses(uuid: str) -> str:
        raise RuntimeError("Not Supported")

    nvml.nvmlDeviceGetHandleByUUID = refuses
    assert Watch(GPU).note == "NVML says nothing here: RuntimeError: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Watch(GPU).note == "pynvml is not installed: pip install nvidia-ml-py"


def test_a_survey_has_two_peaks() -> None:
    facts = survey(CPU, True, "abc").facts
    assert float(facts["peak_tflops"]) >= 0
    assert float(facts["sustained_tflops"]) >= 0
    assert (facts["nvml"], facts["sustained_mhz"]) == ("no CUDA device", "")


def test_a_file_gets_new_columns(tmp_path: Path) -> None:
    def write(*own: dict[str, object]) -> None:
        rows.write("some", list(own), folder=tmp_path, facts={"gpu": "A"}, echo=False)

    write({"ms": 1})
    write({"sm_mhz": 1500, "ms": 2})
    with (tmp_path / "some.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found == [
        {"gpu": "A", "sm_mhz": "", "ms": "1"},
        {"gpu": "A", "sm_mhz": "1500", "ms": "2"},
    ]
    with pytest.raises(ValueError, match="rename one"):
        write({"ms": 3})
