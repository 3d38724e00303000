"""`refit` in two ranks: they share the data, and the first evaluates and writes."""

import json
from pathlib import Path

import pytest

from reap_driver.cli.main import main
from tests.driver.cli.conftest import write_data, write_model
from tests.driver.distributed.launch import ranked


def test_two_ranks_fit_what_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums are added; the ridges may differ a little, as each rank tries them on batches of its
    own.
    """
    model, data = write_model(tmp_path / "model", "qwen3_moe"), write_data(tmp_path / "code.jsonl")
    given = ["--data", str(data), "--seq-len", "16", "--batch-size", "2"]
    half = str(tmp_path / "half")
    assert main(["prune", str(model), *given, "--out", half, "--quiet"]) == 0
    words = ["refit", half, "--original", str(model), *given, "--json", "--quiet", "--out"]
    capsys.readouterr()
    assert main([*words, str(tmp_path / "one")]) == 0
    one = json.loads(capsys.readouterr().out)
    ended = ranked(2, lambda: main([*words, str(tmp_path / "two")]))
    assert ended.code == 0, ended.err
    two = json.loads(ended.out)
    assert not list(tmp_path.glob("*.refit*"))
    for mine, want in zip(two["comparisons"], one["comparisons"], strict=True):
        value, other = (found["overall"]["acceptance"]["value"] for found in (mine, want))
        assert value == pytest.approx(other, abs=0.01)
    first, *_ = (found["refit"]["layers"].values() for found in (two, one))
    for mine, want in zip(first, one["refit"]["layers"].values(), strict=True):
        for key in ("experts", "fitted", "held_out"):
            assert mine[key] == want[key]
        assert mine["error_before"] == pytest.approx(want["error_before"], rel=0.05)
        assert mine["error_after"] == pytest.approx(want["error_after"], rel=0.1)
