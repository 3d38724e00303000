"""The GPU benchmark, where there is no GPU: its smoke mode, its refusal, and red before numbers."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import rows, tables
from bench.gpu import checks, command, layer, machine, report
from bench.gpu.checks import Check
from bench.gpu.clock import Deadline
from bench.gpu.providers import PROVIDERS, Prepared, Work
from reap_kernels.testing import CASES, Case

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = replace(CASES[-1], tokens=16, experts=4, top_k=2, groups=2)


def bench_gpu(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench.gpu` as a user runs it from a checkout."""
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def dies(*_: object) -> str:
    """What a kernel that takes its process along looks like from outside."""
    os.abort()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def here() -> machine.Machine:
    return machine.survey(CPU, True, "abc")


@pytest.mark.slow
def test_smoke_mode_runs_every_stage(tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in rows.RESULTS.iterdir()}
    done = bench_gpu("--smoke", "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"gpu_checks.csv", "gpu_layer.csv", "gpu_end_to_end.csv", "gpu.md"}
    for name in ("gpu_checks", "gpu_layer", "gpu_end_to_end"):
        assert {row["smoke"] for row in read(tmp_path / f"{name}.csv")} == {"yes"}
    ran = read(tmp_path / "gpu_checks.csv")
    assert {row["backend"] for row in ran if row["result"] == "pass"} == set(checks.BACKENDS)
    skipped = {row["detail"] for row in ran if row["result"] != "pass"}
    assert skipped == {"needs a CUDA device"}
    timed = [row for row in read(tmp_path / "gpu_layer.csv") if row["status"] == "timed"]
    keys = [(row["provider"], row["variant"], row["observed"]) for row in timed]
    assert keys == [(p.name, p.variant, "yes" if p.observed else "no") for p in PROVIDERS]
    assert all(float(row["ms"]) > 0 and float(row["error"]) < 2e-2 for row in timed)
    whole = read(tmp_path / "gpu_end_to_end.csv")
    assert {row["provider"] for row in whole} == {"reap", "transformers", "all-experts"}
    page = (tmp_path / "gpu.md").read_text()
    assert "Smoke run" in page
    assert all(f"{p.name}: {p.variant}" in page for p in PROVIDERS)
    assert before == {path.name: path.stat().st_mtime_ns for path in rows.RESULTS.iterdir()}


def test_without_a_gpu_it_says_so() -> None:
    done = bench_gpu()
    assert done.returncode == command.NO_GPU
    assert "needs a CUDA device" in done.stderr
    assert "--smoke" in done.stderr


def test_without_transformers_the_rest_runs(tmp_path: Path) -> None:
    """Only what needs it is skipped, and says why."""
    (tmp_path / "transformers.py").write_text('raise ImportError("not on this machine")\n')
    out = tmp_path / "out"
    arguments = ("--smoke", "--only", "end2end", "--out", str(out))
    done = bench_gpu(*arguments, TRITON_INTERPRET="1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = read(out / "gpu_end_to_end.csv")
    assert row["status"] == "skipped"
    assert "not on this machine" in row["note"]


def test_smoke_rows_need_a_folder_of_their_own() -> None:
    with pytest.raises(SystemExit):
        command.options_of(["--smoke"])
    with pytest.raises(SystemExit):
        command.options_of(["--only", "layers"])


def test_a_wrong_result_ends_the_run_before_timings(tmp_path, monkeypatch, capsys) -> None:
    real = checks.rk.observe_layer

    def broken(*arguments, backend=None, **rest):
        out = real(*arguments, backend=backend, **rest)
        return out * 1.01 if backend == "grouped_mm" else out

    only = [Check(SMALL.name, "grouped_mm", torch.float32, checks.compare, (SMALL,))]
    monkeypatch.setattr(checks.rk, "observe_layer", broken)
    monkeypatch.setattr(checks, "plan", lambda smoke: only)
    monkeypatch.setattr("bench.gpu.facts.plan", lambda smoke: [])
    monkeypatch.setattr(layer, "run", lambda *_: pytest.fail("timed on red"))
    assert command.main(["--smoke", "--out", str(tmp_path)]) == command.RED
    assert "the output is off by" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_checks.csv", "gpu.md"}
    assert "1 failed" in (tmp_path / "gpu.md").read_text()


def test_single_ops_are_checked() -> None:
    """Apart from the smoke mode, since the self-checks of three ops take the interpreter long."""
    assert "equal" in checks.single_ops(CPU, "triton", torch.bfloat16, SMALL)


def test_refusals_are_told_from_failures() -> None:
    def row(backend: str, case: Case, dtype: torch.dtype) -> dict[str, object]:
        check = Check(case.name, backend, dtype, checks.compare, (case,))
        return checks.outcome(check, CPU, Deadline(100))

    odd = next(case for case in CASES if case.name == "odd-sizes")
    assert row("grouped_mm", odd, torch.float32)["result"] == "refused"
    assert row("triton", odd, torch.float64)["result"] == "failed"
    assert checks.is_red("grouped_mm", "its self-check gave wrong numbers: the output is off")
    late = checks.outcome(
        Check("late", "triton", torch.float32, checks.compare, (odd,)), CPU, Deadline(-1)
    )
    assert late["result"] == "skipped"
    assert "budget" in str(late["detail"])


def test_checks_run_in_processes_and_a_dead_one_is_red() -> None:
    odd = next(case for case in CASES if case.name == "odd-sizes")
    alive = Check("alive", "grouped_mm", torch.float32, checks.compare, (odd,))
    dead = Check("dead", "grouped_mm", torch.float32, dies, ())
    found = checks.run(here(), [alive, dead], Deadline(100), workers=1)
    assert [row["check"] for row in found] == ["alive", "dead"]
    assert [row["result"] for row in found] == ["refused", "failed"]
    assert "process died" in str(found[1]["detail"])


def test_a_provider_that_is_wrong_is_not_timed(monkeypatch) -> None:
    def prepare(work: Work) -> Prepared:
        wrong = torch.ones(len(work.sample), work.case.hidden)
        return Prepared([lambda: pytest.fail("timed")], lambda: (wrong, None))

    own = replace(PROVIDERS[0], prepare=prepare)
    peer = replace(PROVIDERS[-2], prepare=prepare)
    monkeypatch.setattr(layer, "PROVIDERS", (own, peer))
    found = layer.run(here(), layer.plan(smoke=True), Deadline(100))
    assert [row["status"] for row in found] == ["failed", "wrong"]
    assert {row["ms"] for row in found} == {""}


def test_what_the_budget_cuts_off_is_said() -> None:
    found = layer.run(here(), layer.plan(smoke=False), Deadline(-1))
    assert len(found) == len(layer.plan(smoke=False)) * len(PROVIDERS)
    assert {row["status"] for row in found} == {"skipped"}
    assert "budget" in report.layer(found)


def test_readme_tables_are_made_from_rows(tmp_path, monkeypatch) -> None:
    facts = {**here().facts, "gpu": "A GPU", "smoke": "no"}
    row = layer._row(replace(layer.SHAPES[0], tokens=16384, skew="balanced"), PROVIDERS[0], "timed")
    rows.write("gpu_layer", [{**row, "ms": "1.5"}], folder=tmp_path, facts=facts, echo=False)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.TABLES["gpu_layer"]()
    assert "| 1.5 |" in text
    assert "A GPU" in text
