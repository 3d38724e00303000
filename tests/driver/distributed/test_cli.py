"""The command line under torchrun: 2 and 3 ranks give the result of one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reap_driver.cli.main import main
from reap_kernels import SaliencyStats
from tests.driver.cli.conftest import write_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer."""
    return write_model(tmp_path_factory.mktemp("model") / "model", "qwen3_moe", num_hidden_layers=3)


@pytest.fixture
def words(model: Path, tmp_path: Path) -> list[str]:
    """An observation of two groups, 7 batches."""
    sources = []
    for group, tokens in (("code", 130), ("text", 80)):
        path = tmp_path / f"{group}.jsonl"
        path.write_text(json.dumps({"input_ids": [(5 * i) % 250 for i in range(tokens)]}) + "\n")
        sources += ["--data", str(path)]
    return ["observe", str(model), *sources, "--seq-len", "16", "--batch-size", "2"]


def torchrun(size: int, arguments: list[str], *before: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command line in `size` processes; `before` precede the path of modules."""
    path = os.pathsep.join(map(str, [*before, ROOT, ROOT / "python"]))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run(
        [sys.executable, *start, "-m", "reap_driver", *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def assert_one_process(mine: SaliencyStats, words: list[str], out: Path) -> None:
    """Counts are exact, sums within 1e-12 of those of one process."""
    assert main([*words, "--out", str(out)]) == 0
    theirs = SaliencyStats.load(out)
    assert len(mine.parts) == 8
    for part, other in zip([mine, *mine.parts], [theirs, *theirs.parts], strict=True):
        assert_close(part, other)


def assert_close(mine: SaliencyStats, theirs: SaliencyStats) -> None:
    assert list(mine.layers) == list(theirs.layers)
    assert mine.groups == theirs.groups == ["code", "text"]
    for name, layer in mine.layers.items():
        other = theirs.layers[name]
        assert torch.equal(layer.counts, other.counts)
        assert torch.equal(layer.tokens, other.tokens)
        assert torch.equal(layer.extrema, other.extrema)
        torch.testing.assert_close(layer.sums, other.sums, rtol=1e-12, atol=0)
    left, right = ({**s.provenance, "created": None} for s in (mine, theirs))
    assert left == right


def test_three_ranks_stream(words: list[str], tmp_path: Path) -> None:
    """There is one result and one JSON object, and no journal is left."""
    out = tmp_path / "many"
    done = torchrun(3, [*words, "--stream", "always", "--out", str(out), "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 210
    assert_one_process(SaliencyStats.load(out), words, tmp_path / "one")
    assert not list(tmp_path.glob("*journal*"))


def test_two_ranks_prune(words: list[str], tmp_path: Path) -> None:
    """The first rank writes the output, the other prints nothing."""
    out = tmp_path / "pruned"
    done = torchrun(2, ["prune", *words[1:], "--out", str(out), "--ratio", "0.5"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("observed 210 tokens") == 1
    assert 4 in json.loads((out / "config.json").read_text()).values()
    stats = SaliencyStats.load(out / "reap" / "stats.safetensors")
    assert_one_process(stats, words, tmp_path / "one")
    assert not list(tmp_path.glob("*journal*"))


def test_a_rank_that_fails_ends_the_run(words: list[str], model: Path, tmp_path: Path) -> None:
    """Only its error is shown; the journals of all ranks are kept and resumed."""
    site = tmp_path / "site"
    site.mkdir()
    # Makes one rank fail in the middle, as a GPU fault does.
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import reap_driver.observation.run as run\n"
        "    from reap_kernels.errors import ResourceError\n"
        "    feed, calls = run.Run.feed, []\n"
        "    def fail(self, number, ids):\n"
        "        calls.append(number)\n"
        "        if len(calls) == 2:\n"
        "            raise ResourceError('device 1 is gone')\n"
        "        return feed(self, number, ids)\n"
        "    run.Run.feed = fail\n"
    )
    arguments = [*words, "--out", str(tmp_path / "out"), "--journal-every", "1"]
    failed = torchrun(2, arguments, site)
    assert failed.returncode != 0
    errors = [line for line in failed.stderr.splitlines() if line.startswith("reap-kernels: error")]
    assert errors == ["reap-kernels: error: rank 1: device 1 is gone"]
    assert not (tmp_path / "out").exists()
    positions = [
        json.loads((tmp_path / f"out.journal-{rank}-of-2" / "journal.json").read_text())["position"]
        for rank in range(2)
    ]
    assert positions[1] == 1
    assert positions[0] >= 1
    done = torchrun(2, [*arguments, "--resume"])
    assert done.returncode == 0, done.stderr
    assert re.search(r"observed 210 tokens in 3 layers", done.stdout)
    assert_one_process(SaliencyStats.load(tmp_path / "out"), words, tmp_path / "one")
