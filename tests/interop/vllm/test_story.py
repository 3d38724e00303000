"""The program of the guide runs: profile, plan, mask, write and serve, on two servers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reap_driver as rd
from reap_kernels import SaliencyStats
from tests.interop.vllm.installed import ROOT
from tests.limits import HUNG

PROGRAM = ROOT / "examples" / "live" / "story.py"


@pytest.fixture(scope="module")
def out(metadata: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program has left, with what it has said as `said.txt`."""
    folder = tmp_path_factory.mktemp("story")
    path = os.pathsep.join(map(str, (metadata, ROOT, ROOT / "python")))
    variables = {"PYTHONPATH": path, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), "--enforce-eager"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=20 * HUNG,
        check=False,
    )
    logs = [path.read_text(errors="replace")[-3000:] for path in folder.glob("*.log")]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
    (folder / "said.txt").write_text(done.stdout)
    return folder


def test_the_pruned_checkpoint_answers_as_the_masked_server(out: Path) -> None:
    said = (out / "said.txt").read_text()
    found = re.search(r"(\d+) log-probabilities differ .* by (\S+) at most", said)
    assert found is not None, said
    assert int(found[1]) > 2000
    assert float(found[2]) < 2e-5
    whole, masked, pruned = map(float, re.findall(r"(\d+\.\d+) (?:whole|masked|of)", said))
    assert masked == pruned
    assert 0.98 * whole < masked < 1.3 * whole


def test_both_groups_are_in_the_statistics_that_it_planned_from(out: Path) -> None:
    stats = SaliencyStats.load(out / "stats.safetensors")
    assert stats.groups == ["code", "docstrings"]
    plan = rd.Plan.load(out / "plan.json")
    assert plan.kept == rd.make_plan(rd.score(stats, "reap"), ratio=0.25).kept
    assert {len(kept) for kept in plan.kept.values()} == {24}
