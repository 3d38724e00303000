"""The report of `doctor`: complete, serializable, and true to what dispatch does."""

import json
import types

import pytest
import torch

from reap_kernels import dispatch, doctor


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    """As for users: Triton does not serve the CPU then, so nothing is checked."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_report_is_complete_and_serializable() -> None:
    report = json.loads(json.dumps(doctor.report()))
    assert torch.__version__.startswith(report["packages"]["torch"].split("+")[0])
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert set(report["cpu"]["computes"]) == {"bfloat16", "float16", "float32"}
    rows = [row for row in report["backends"] if row["device"] == "cpu"]
    for op in dispatch.OPS:
        chosen = {row["backend"] for row in rows if row["op"] == op and row["reason"] is None}
        request = dispatch.Request(op, torch.device("cpu"), torch.float32)
        assert chosen == {dispatch.select(request).name}


def test_absent_packages_are_named_not_hidden(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert doctor.report()["packages"]["no-such-package"] is None


def test_lines_of_launch_tables_that_are_off_are_shown(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_launch_tables", lambda: {"sm90": ["by hand"]})
    off = doctor.report()["launches_off"]["sm90"]
    assert off["norm half: triton"] == "has not run on a GPU"
    assert off["layer half rows <= 255: wgmma"] == "has not run on a GPU"


def test_nvcc_absent(monkeypatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.report()["nvcc"] is None


def test_cuda_kernels_are_there_or_the_reason_is(monkeypatch) -> None:
    built = types.SimpleNamespace(CUDA_VERSION="13.0")
    monkeypatch.setattr(doctor.cuda, "module", lambda: built)
    assert doctor.report()["cuda_kernels"] == {"cuda": "13.0", "reason": None}
    monkeypatch.setattr(doctor.cuda, "module", lambda: "it was not built")
    assert doctor.report()["cuda_kernels"] == {"cuda": None, "reason": "it was not built"}
