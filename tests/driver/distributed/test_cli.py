"""The command line in several ranks: 2 and 3 give the result of one process.

One test starts torchrun as a user does; the others fork their ranks from this process.
"""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reap_driver.cli.main import main
from reap_driver.observation import run
from reap_driver.observation.data_parallel import Ranks
from reap_kernels import SaliencyStats
from reap_kernels.errors import ResourceError
from tests.driver.cli.conftest import write_model
from tests.driver.data.test_folds import assert_close
from tests.driver.distributed.launch import ranked
from tests.limits import HUNG

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


def assert_one_process(mine: SaliencyStats, words: list[str], out: Path) -> None:
    """Counts are exact, sums within 1e-12 of those of one process."""
    assert main([*words, "--out", str(out)]) == 0
    theirs = SaliencyStats.load(out)
    assert len(mine.parts) == 8
    for part, other in zip([mine, *mine.parts], [theirs, *theirs.parts], strict=True):
        assert part.groups == ["code", "text"]
        assert_close(part, other)
        left, right = (
            {**stats.provenance, "created": None, "observed": None} for stats in (part, other)
        )
        assert left == right


def test_three_ranks_stream(words: list[str], tmp_path: Path) -> None:
    """There is one result and one JSON object, and no journal is left."""
    out = tmp_path / "many"
    command = [*words, "--stream", "always", "--out", str(out), "--json"]
    ended = ranked(3, lambda: main(command))
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["tokens"] == 210
    assert_one_process(SaliencyStats.load(out), words, tmp_path / "one")
    assert not list(tmp_path.glob("*journal*"))


def test_two_ranks_prune(words: list[str], tmp_path: Path) -> None:
    """Under torchrun itself: the first rank writes the output, the other prints nothing."""
    out = tmp_path / "pruned"
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["prune", *words[1:], "--out", str(out), "--ratio", "0.5"]
    done = subprocess.run(
        [sys.executable, *start, "-m", "reap_driver", *command],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "python"])),
        },
        capture_output=True,
        text=True,
        timeout=HUNG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("observed 210 tokens") == 1
    assert 4 in json.loads((out / "config.json").read_text()).values()
    stats = SaliencyStats.load(out / "reap" / "stats.safetensors")
    assert_one_process(stats, words, tmp_path / "one")
    assert not list(tmp_path.glob("*journal*"))


def test_a_rank_that_fails_ends_the_run(words: list[str], tmp_path: Path) -> None:
    """The other waits for its statistics. Only the error is shown; both journals are resumed."""
    command = [*words, "--out", str(tmp_path / "out"), "--journal-every", "1"]
    feed, fed, merged = run.Run.feed, 0, Ranks.merged
    observed = multiprocessing.get_context("fork").Event()

    def merge(self: Ranks, stats: SaliencyStats) -> Any:
        observed.set()
        return merged(self, stats)

    def fail(self: run.Run, *batch: Any) -> Any:
        """In the middle, as a GPU fault does."""
        nonlocal fed
        fed += 1
        if fed == 2:
            assert observed.wait(HUNG)
            raise ResourceError("device 1 is gone")
        return feed(self, *batch)

    def failing() -> int:
        if os.environ["RANK"] == "0":
            Ranks.merged = merge  # type: ignore[method-assign]
        else:
            run.Run.feed = fail  # type: ignore[method-assign]
        return main(command)

    ended = ranked(2, failing)
    assert ended.code == 1
    errors = [line for line in ended.err.splitlines() if line.startswith("reap-kernels: error")]
    assert errors == ["reap-kernels: error: rank 1: device 1 is gone"]
    assert not (tmp_path / "out").exists()
    positions = [
        json.loads((tmp_path / f"out.journal-{rank}-of-2" / "journal.json").read_text())["position"]
        for rank in range(2)
    ]
    assert positions == [7, 1]  # all of its own, and one
    alone = ranked(1, lambda: main([*command, "--resume", "auto"]))
    assert "interrupted, as rank 0 of 2, and now there are 1; start as many" in alone.err
    ended = ranked(2, lambda: main([*command, "--resume"]))
    assert ended.code == 0, ended.err
    assert re.search(r"observed 210 tokens in 3 layers", ended.out)
    assert_one_process(SaliencyStats.load(tmp_path / "out"), words, tmp_path / "one")


def test_ranks_by_one_fixed_command(words: list[str], tmp_path: Path) -> None:
    """One rank was killed before it wrote a journal, the other behind its last batch: they agree
    how to go on, and in the end that nothing is left to do.
    """
    out = tmp_path / "out"
    command = [*words, "--out", str(out), "--journal-every", "1", "--resume", "auto"]
    folders = [tmp_path / f"out.journal-{rank}-of-2" for rank in range(2)]
    save = SaliencyStats.save

    def fail(self: SaliencyStats, path: Any) -> None:
        if Path(path) == out:
            raise ResourceError("the disk is full")
        save(self, path)

    def failing() -> int:
        SaliencyStats.save = fail  # type: ignore[method-assign]
        return main(command)

    assert ranked(2, failing).code == 1
    assert all((folder / "journal.json").exists() for folder in folders)
    shutil.rmtree(folders[0])
    ended = ranked(2, lambda: main(command))
    assert ended.code == 0, ended.err
    assert_one_process(SaliencyStats.load(out), words, tmp_path / "one")
    ended = ranked(2, lambda: main([*command, "--json"]))
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == {"command": "observe", "out": str(out), "complete": True}
