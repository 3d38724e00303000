"""Images on the command line: vision experts are observed, ranked and pruned."""

import json
from pathlib import Path

import pytest

import reap_driver as rd
from reap_kernels import SaliencyStats
from tests.driver.cli.conftest import Run, run
from tests.driver.images import tiny
from tests.driver.images.tiny import ERNIE, QWEN, png, says

__all__ = ["run"]  # a fixture

LENGTH = ("--seq-len", 64, "--device", "cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten records, eight of which have an image."""
    records = []
    for number in range(10):
        parts = ["what is ", {"type": "image", "path": f"{number}.png"}, "?"]
        question = says(*parts) if number % 5 else says("no picture here")
        records.append({"messages": [question, says("a picture", role="assistant")]})
        (tmp_path / f"{number}.png").write_bytes(png(number))
    path = tmp_path / "pictures.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_vision_experts_are_ranked_and_cut(run: Run, data: Path, tmp_path: Path) -> None:
    """The same experts, streamed or not."""
    model, out = tmp_path / "model", tmp_path / "out"
    tiny.write(model, ERNIE)
    for stream in ("never", "always"):
        stats = tmp_path / stream
        options = ("--data", data, *LENGTH, "--stream", stream, "--folds", 2)
        done = run("observe", model, *options, "--out", stats)
        assert done.code == 0, done.err
        seen = SaliencyStats.load(stats)
        assert len(seen.layers) == 4
        [source] = seen.provenance["data"]
        assert (source["images"], source["records"]) == (8, 10)
        vision = {int(layer.tokens.sum()) for n, layer in seen.layers.items() if "vision" in n}
        assert vision == {8 * (6 + 2)}
        assert run("plan", stats, "--ratio", 0.25, "--out", tmp_path / f"plan-{stream}").code == 0
    plan = tmp_path / "plan-never"
    assert rd.Plan.load(plan).kept == rd.Plan.load(tmp_path / "plan-always").kept
    applied = run("apply", model, plan, "--out", out)
    assert applied.code == 0, applied.err
    pruned = rd.load_model(out)
    assert {layer.num_experts for layer in rd.find_moe_layers(pruned)} == {6}
    compared = run("compare", model, plan, "--data", data, *LENGTH)
    assert compared.code == 0, compared.err


def test_prune_with_images(run: Run, data: Path, tmp_path: Path) -> None:
    tiny.write(tmp_path / "model", QWEN)
    options = ("--data", data, *LENGTH, "--ratio", 0.25)
    done = run("prune", tmp_path / "model", *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    (tmp_path / "3.png").write_bytes(b"broken")
    refused = run("prune", tmp_path / "model", *options, "--out", tmp_path / "two")
    assert refused.code == 3
    assert f"{data}:4: an image cannot be decoded (it has no known format)" in refused.error
