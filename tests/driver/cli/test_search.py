"""`search` on a tiny checkpoint: a plan, its figures, resumed searches, refusals."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
from reap_driver.cli.main import main
from reap_driver.memory.decision import decide
from reap_driver.memory.host_memory import Free
from reap_driver.memory.machine import Machine
from reap_driver.plan_search.search_state import SearchState, read
from reap_driver.workflow import holding
from tests.driver.cli.conftest import Run, write_data, write_model
from tests.driver.cli.forks import forked, signalled_behind

COMMON = ("--seq-len", 16, "--population", 5, "--elites", 2, "--ratio", 0.25, "--batch-size", 4)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers; read only."""
    return write_model(tmp_path_factory.mktemp("deep") / "model", "qwen3_moe", num_hidden_layers=4)


@pytest.fixture(scope="module")
def stats(deep: Path) -> Path:
    """Its statistics; read only."""
    out, data = deep.with_name("stats.safetensors"), write_data(deep.with_name("code.jsonl"))
    words = ["observe", deep, "--data", data, "--seq-len", 32, "--out", out, "--quiet"]
    assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture
def words(deep: Path, stats: Path, data: Path) -> tuple[Any, ...]:
    """The command without --out and --evaluations."""
    return ("search", deep, stats, "--data", data, *COMMON)


def test_a_plan_and_what_it_is_worth(run: Run, words: Any, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    outcome = run(*words, "--evaluations", 12, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    plan, said = rd.Plan.load(out), outcome.json
    assert (plan.allocation, said["allocation"], said["evaluations"]) == (
        "searched",
        "searched",
        12,
    )
    assert sum(len(layer.removed) for layer in plan.layers.values()) == 8 == said["removed"]
    assert 0 < said["acceptance"]["uniform"] <= said["acceptance"]["searched"] <= 1
    held = said["held_out"]
    assert held["difference_low"] <= held["searched"] - held["uniform"] <= held["difference_high"]
    both = said["predictions"] + held["predictions"]
    assert 0.4 < held["predictions"] / both < 0.6
    assert said["cache_bytes"] == said["predictions"] * (259 * 4 + 4)
    assert "logits for" in outcome.err
    assert any(f"on {held['sequences']} held-out sequences" in note for note in plan.notes)
    assert not list(tmp_path.glob("*.search*"))


def test_without_validation_everything_is_searched_on(run: Run, words: Any, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    half = run(*words, "--generations", 1, "--out", out, "--json").json
    rest = ("--validation", 0, "--overwrite", "--out", out)
    whole = run(*words, "--generations", 3, *rest, "--json").json
    assert (half["evaluations"], whole["evaluations"]) == (5, 5 + 2 * 3)
    assert whole["held_out"] is None
    assert whole["predictions"] == half["predictions"] + half["held_out"]["predictions"]
    said = run(*words, "--generations", 1, *rest)
    assert f"wrote {out}; next: reap-kernels apply MODEL {out} --non-uniform --out DIR" in said.out


def test_killed_and_interrupted_searches_go_on_to_the_same_bits(
    run: Run, words: Any, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.json", tmp_path / "plan.json"
    assert run(*words, "--evaluations", 16, "--out", whole).code == 0
    state = tmp_path / "plan.json.search"
    known = [0]
    for number in (signal.SIGKILL, signal.SIGINT):
        resume = ["--resume"] if state.exists() else []
        command = [*map(str, words), "--evaluations", "16", "--out", str(out), *resume]
        ended = forked(command, signalled_behind(5, number))
        assert ended.code == {signal.SIGKILL: -9, signal.SIGINT: 130}[number], ended.err
        assert not out.exists()
        known.append(len(read(state).evaluated))
    assert known == sorted(set(known)), "each went on from where the last one was"
    assert (
        f"interrupted after {known[-1]} candidates; they are saved in {state}: run the" in ended.err
    )
    outcome = run(*words, "--evaluations", 16, "--out", out, "--resume")
    assert outcome.code == 0, outcome.err
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.search*"))


def test_one_fixed_command(run: Run, words: Any, tmp_path: Path) -> None:
    """With --resume auto it begins, goes on, and finds its plan complete."""
    out, state = tmp_path / "plan.json", tmp_path / "plan.json.search"
    command = [*words, "--evaluations", 16, "--out", out, "--resume", "auto"]
    ended = forked(list(map(str, command)), signalled_behind(5, signal.SIGKILL))
    assert (ended.code, state.exists(), out.exists()) == (-9, True, False)
    shutil.copy(state, tmp_path / "state")
    assert run(*command).code == 0
    found = out.read_bytes()
    shutil.copy(tmp_path / "state", state)  # as if killed before it was deleted
    again = run(*command)
    assert again.out == f"{out} is complete, made by this command; nothing to do\n"
    assert (out.read_bytes(), state.exists()) == (found, False)
    refused = run(*command, "--evaluations", 17)
    assert "was made by another command: evaluations was 16, now it is 17" in refused.error
    SearchState(state, {}).write({(1,): 0.5}, 1)
    other = run(*command)
    assert "the state of a search is of another run: model was None" in other.error


def test_a_state_that_is_there(run: Run, words: Any, tmp_path: Path) -> None:
    out, state = tmp_path / "plan.json", tmp_path / "plan.json.search"
    missing = run(*words, "--out", out, "--resume")
    assert (missing.code, "there is no state of a search" in missing.error) == (3, True)
    SearchState(state, {}).write({(1,): 0.5}, 1)
    left = run(*words, "--out", out)
    assert (left.code, f"{state}: the state of a search that was int" in left.error) == (3, True)
    other = run(*words, "--out", out, "--resume")
    assert (
        other.code,
        "the state of a search is of another run: model was None" in other.error,
    ) == (3, True)
    assert run(*words, "--evaluations", 8, "--out", out, "--overwrite").code == 0
    assert not state.exists()


def test_protected_experts_stay(run: Run, words: Any, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    rest = ("--protect", "1:0,1,2,3,4,5", "--skip-first", 1, "--evaluations", 8, "--out", out)
    assert run(*words, *rest).code == 0
    plan = rd.Plan.load(out)
    first, second, *_ = plan.layers.values()
    assert not first.removed
    assert set(range(6)) <= set(second.kept)
    assert plan.settings["protected"] == {list(plan.layers)[1]: [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize(
    ("rest", "code", "says"),
    [
        (("--allocation", "global"), 2, "unrecognized arguments: --allocation"),
        (("--stream", "always"), 2, "--stream always: a search needs the whole model in memory"),
        (("--device-map", "auto", "--device", "cpu"), 2, "--device-map auto: not together with"),
        (("--elites", 5), 2, "--elites 5: give fewer than the population of 5"),
        (("--validation", 1), 2, "--validation 1.0: give 0, or a share from 0.05 to 0.95"),
        (("--validation", "nan"), 2, "--validation nan: give 0, or a share"),
        (("--validation", 0.01), 2, "--validation 0.01: give 0, or a share"),
        (("--evaluations", 9, "--generations", 2), 2, "not allowed with argument"),
        (("--seq-len", 256, "--validation", 0.95), 3, "too few to hold out 19/20 of them; give"),
        (("--backend", "nonesuch"), 4, "nonesuch"),
        (("--ratio", 0.7), 3, "no budget but the uniform one removes 20 experts from 4 layers"),
    ],
)
def test_what_is_refused(
    rest: Any, code: int, says: str, run: Run, words: Any, tmp_path: Path
) -> None:
    outcome = run(*words, *rest, "--out", tmp_path / "plan.json")
    assert (outcome.code, says in outcome.error) == (code, True), outcome.error
    assert not list(tmp_path.glob("plan.json*"))


def test_data_is_required(run: Run, deep: Path, stats: Path, tmp_path: Path) -> None:
    outcome = run("search", deep, stats, "--out", tmp_path / "plan.json")
    assert (outcome.code, "give --data or --recipe" in outcome.error) == (2, True)


def test_another_model_is_refused(
    run: Run, model: Path, stats: Path, data: Path, tmp_path: Path
) -> None:
    outcome = run("search", model, stats, "--data", data, *COMMON, "--out", tmp_path / "plan.json")
    assert (outcome.code, "statistics of this model" in outcome.error) == (3, True), outcome.error


def test_a_model_that_does_not_fit_is_refused(
    run: Run, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = Free(400_000_000, "by a test")
    machine = Machine("cpu", free, free, Free(1 << 40, "by a test"))
    monkeypatch.setattr(holding, "this_machine", lambda *_: machine)
    monkeypatch.setattr(holding, "decide", lambda _, *rest: decide("always", *rest))
    outcome = run(*words[:-2], "--out", tmp_path / "plan.json")
    assert outcome.code == 4
    assert "does not fit in memory, and a search runs it for every plan" in outcome.error
