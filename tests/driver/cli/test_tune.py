"""`reap-kernels tune`: what it measures, what it saves, and what it says where there is no GPU."""

from pathlib import Path

import pytest
import torch

from reap_kernels import tune as search
from reap_kernels.tuning import Launch, Table
from tests.driver.cli.conftest import Run


@pytest.fixture
def quick(monkeypatch) -> None:
    """One bucket, two launches, a clock of our own; products in Triton's interpreter."""
    monkeypatch.setattr(search, "BUCKETS", ((None, 4),))
    few = [Launch(16, 32, 32, 1, 4, 1), Launch(32, 32, 32, 1, 4, 1)]
    options = search.tune.__kwdefaults__
    monkeypatch.setitem(options, "tried", lambda *_: few)
    monkeypatch.setitem(options, "timer", lambda call: 1.0)


@pytest.mark.usefixtures("quick")
def test_tunes_the_shapes_of_a_model(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "launches.json"
    done = run("tune", model, "--dtype", "float32", "--device", "cpu", "--out", out, "--json")
    assert done.code == 0, done.err
    facts = done.json
    assert (facts["arch"], facts["measured"], facts["refused"]) == ("interpreter", 4, 0)
    table = Table.load(out)
    assert [entry.as_json() for entry in table.entries] == facts["entries"]
    assert {entry.op for entry in table.entries} == {"gate_up", "down", "sort", "layer", "saliency"}
    again = run("tune", model, "--dtype", "float32", "--device", "cpu", "--out", out)
    assert (again.code, "exists; choose another name" in again.err) == (3, True)


def test_needs_a_gpu(run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        done = run("tune", "--shape", "8,2,64,32", "--out", tmp_path / "t.json")
        assert done.code == 4
        assert "tune times kernels on a GPU, and torch sees none here" in done.err
        done = run("tune", "--shape", "8,2,64,32", "--device", "cuda", "--out", tmp_path / "t.json")
        assert done.code == 3
        assert "--device cuda: not there" in done.err
    done = run("tune", "--shape", "8,2,64,32", "--device", "cpu", "--out", tmp_path / "t.json")
    assert done.code == 4
    assert "run `tune` on the GPU that is to use the table" in done.err
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("shape", ["8,2,64", "8,2,64,x", "8,0,64,32", "2,8,64,32"])
def test_bad_shapes(run: Run, tmp_path: Path, shape: str) -> None:
    done = run("tune", "--shape", shape, "--out", tmp_path / "t.json")
    assert done.code == 2
    assert shape in done.err


def test_a_model_or_shapes(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("tune", "--out", tmp_path / "t.json").code == 2
    both = run("tune", model, "--shape", "8,2,64,32", "--out", tmp_path / "t.json")
    assert both.code == 2
