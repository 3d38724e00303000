"""Every program in examples/ runs, and prints what it found."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import reap_driver as rd
import reap_kernels as rk
from docs.generate import programs
from reap_driver.cli.main import main

EXAMPLES = Path(__file__).parent.parent / "examples"
# Programs that need the environment of `make test-engines`, and the tests there that run them.
ELSEWHERE = {"gguf.py": "tests/interop/llamacpp/test_llamacpp.py"}
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize(
    "program",
    [program for program in PROGRAMS if program.name not in ELSEWHERE],
    ids=lambda path: path.name,
)
def test_programs_run(program: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path / "out")])
    runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_programs_run_elsewhere(name: str) -> None:
    assert f'run_path("examples/{name}"' in (EXAMPLES.parent / ELSEWHERE[name]).read_text()


def test_the_list_of_programs_is_complete() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert PROGRAMS
    for program in EXAMPLES.rglob("*.py"):
        name = program.relative_to(EXAMPLES).as_posix()
        assert f"[{name}]({name})" in text, name


def test_what_a_layer_returned_is_planned_from_its_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLES / "observe_layer.py"), run_name="__main__")
    observed = rk.SaliencyStats.load("statistics.safetensors")
    assert list(observed.layers) == list(found["model"])
    for name, stats in observed.layers.items():
        assert stats.tokens.tolist() == [4 * 256]
        assert int(stats.count.sum()) == 4 * 256 * found["TOP_K"]
        assert torch.equal(stats.sums, found["stats"][name].sums)
    words = ["plan", "statistics.safetensors", "--ratio", "0.5", "--out", "plan.json", "-q"]
    assert main(words) == 0
    plan = rd.Plan.load(Path("plan.json"))
    for name, stats in observed.layers.items():
        best = (stats.weighted_norm_sum / stats.count)[0].topk(4).indices
        assert plan.kept[name] == tuple(best.sort().values.tolist())


def test_what_an_engine_computed_is_what_the_reference_measures(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLES / "accumulate.py"), run_name="__main__")
    torch.manual_seed(1)
    x, router, experts = torch.randn(64, 64), found["router"], found["experts"]
    stats, sums = rk.LayerStats(8), torch.zeros(8, dtype=torch.float64)
    with torch.no_grad():
        found["moe"](x, router, experts, stats)
        weights, ids = (x @ router.T).softmax(-1).topk(2)
        for token in range(64):
            for weight, number in zip(weights[token], ids[token].tolist(), strict=True):
                sums[number] += (weight * experts[number](x[token])).double().norm()
    torch.testing.assert_close(stats.weighted_norm_sum[0], sums, rtol=1e-5, atol=0)
    assert rd.Plan.load(Path("plan.json")).kept == found["plan"].kept


@pytest.mark.parametrize("name", ["observe_layer.py", "accumulate.py"])
def test_both_engines_stay_short(name: str) -> None:
    lines = [line for line in (EXAMPLES / name).read_text().splitlines() if line.strip()]
    assert len(lines) <= 30, f"{name} has {len(lines)} lines"


def test_an_engine_needs_the_core_alone_to_observe() -> None:
    assert "reap_kernels" in (EXAMPLES / "observe_layer.py").read_text()
    assert "reap_driver" not in (EXAMPLES / "observe_layer.py").read_text()


def test_the_page_shows_the_programs_that_are_tested() -> None:
    page = (EXAMPLES.parent / "docs/guides/backend.md").read_text()
    for name in ("observe_layer.py", "accumulate.py"):
        assert f"<!-- generated program {name} -->" in page
        assert (EXAMPLES / name).read_text() in programs.render(name)
