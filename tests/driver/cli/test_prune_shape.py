"""`prune --shape`: what observing with Gram matrices, planning and applying give, in one command
that can be interrupted anywhere.
"""

import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import torch

import reap_driver as rd
from reap_driver.cli.main import main
from reap_driver.observation import journal as journals
from tests.driver.cli.conftest import Run, observation
from tests.driver.cli.forks import forked, killed_before
from tests.driver.distributed.launch import ranked
from tests.driver.published.reduce import CONFIGS
from tests.forks import Ended


@pytest.fixture(scope="module")
def words(three_deep: Path) -> list[str]:
    """An observation of 6 batches; an entry of the journal behind each."""
    return observation(three_deep, 6, "code")[1:]


@pytest.fixture(scope="module")
def whole(three_deep: Path, words: list[str]) -> dict[str, bytes]:
    """The weights that single steps give, and the layers of the plan."""
    stats, gram, plan = (three_deep.with_name(name) for name in ("stats", "sums", "plan.json"))
    assert main(["observe", *words, "--out", str(stats), "--gram", str(gram)]) == 0
    shape = ["--shape", "6x16", "--gram", str(gram), "--quiet"]
    assert main(["plan", str(stats), *shape, "--out", str(plan)]) == 0
    assert (
        main(["apply", str(three_deep), str(plan), "--out", str(three_deep.with_name("cut")), "-q"])
        == 0
    )
    return content(three_deep.with_name("cut"))


def content(folder: Path) -> dict[str, bytes]:
    """The weights and the configuration of a checkpoint, and the layers of its plan."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}
    layers = rd.Plan.load(folder / "reap" / "plan.json").layers
    return files | {"config": (folder / "config.json").read_bytes(), "plan": repr(layers).encode()}


def left(folder: Path) -> set[str]:
    """What there is in a folder, but for locks."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize("stream", ["never", "always"])
def test_it_is_its_three_steps(
    run: Run, words: list[str], whole: dict[str, bytes], stream: str, tmp_path: Path
) -> None:
    made = run("prune", *words, "--shape", "6x16", "--stream", stream, "--out", tmp_path / "out")
    assert made.code == 0, made.err
    assert content(tmp_path / "out") == whole
    assert left(tmp_path) == {"out"}
    plan = rd.Plan.load(tmp_path / "out/reap/plan.json")
    assert plan.run["settings"] == {"shape": "6x16", "ridge": 1e-3}


def test_a_shape_is_chosen(run: Run, words: list[str], tmp_path: Path) -> None:
    shape = ["--shape", "auto", "--ratio", 0.5, "--width-multiple", 4]
    words = [word for word in words if word != "--quiet"]
    command = ["prune", *words, *shape, "--out", tmp_path / "out", "--resume", "auto"]
    made = run(*command)
    assert made.code == 0, made.err
    plan = rd.Plan.load(tmp_path / "out/reap/plan.json")
    assert f"chose {plan.shape}, of the least expected error" in made.err
    assert left(tmp_path) == {"out"}
    assert "is complete, made by this command" in run(*command).out
    again = run("prune", *words, "--shape", "6x16", "--out", tmp_path / "out", "--resume", "auto")
    assert again.code == 3
    assert "was made by another command" in again.error


def test_in_python(three_deep: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    data = three_deep.with_name("code.jsonl")
    given = {"seq_len": 16, "batch_size": 2, "out": tmp_path / "out", "shape": "6x16"}
    pruned = rd.prune(three_deep, data, **given)
    assert isinstance(pruned, rd.Pruned)
    assert content(tmp_path / "out") == whole
    assert pruned.facts()["shape"] == "6x16"
    assert "gram" not in pruned.facts()
    report = pruned.applied.report
    assert set(report.neurons_per_layer.values()) == {(24, 16)}


@pytest.mark.parametrize("stream", ["never", "always"])
def test_killed_at_random_points(
    words: list[str], whole: dict[str, bytes], stream: str, tmp_path: Path
) -> None:
    """kill -9 before a change to files, up to five times, with one fixed command."""
    counter = multiprocessing.get_context("fork").Value("i", 0)

    def started(out: Path, last: int | None) -> Ended:
        counter.value = 0
        options = ["--shape", "6x16", "--stream", stream, "--resume", "auto"]
        command = ["prune", *words, *options, "--out", str(out)]
        ended = forked(command, killed_before(last, counter))
        assert ended.code in (0, -signal.SIGKILL), ended.err
        return ended

    assert started(tmp_path / "a", None).code == 0
    changes, chance, kills = counter.value, random.Random(1), 0
    for _ in range(5):
        if started(tmp_path / "b", chance.randint(changes // 4, changes // 2)).code == 0:
            break
        kills += 1
    assert kills > 1
    for name, last in (("b", None), ("c", int(0.7 * changes)), ("d", int(0.9 * changes))):
        out = tmp_path / name
        assert last is None or started(out, last).code == -signal.SIGKILL
        assert started(out, None).code == 0
        assert content(out) == whole
    assert left(tmp_path) == {"a", "b", "c", "d"}


def test_an_end_after_observing_goes_on_from_there(
    run: Run, words: list[str], whole: dict[str, bytes], tmp_path: Path, monkeypatch
) -> None:
    """Ctrl-C while neurons are removed: the Gram matrices are kept for `--resume`."""
    command = ["prune", *words, "--shape", "6x16", "--out", tmp_path / "out"]
    put, done = rd.Matrices.put, []

    def ending(self: rd.Matrices, name: str, down: torch.Tensor) -> None:
        if done:
            raise KeyboardInterrupt
        put(self, name, down)
        done.append(name)

    with monkeypatch.context() as patched:
        patched.setattr(rd.Matrices, "put", ending)
        assert run(*command, "--no-journal").code == 130
        assert left(tmp_path) == set()
        assert run(*command).code == 130
    assert left(tmp_path) == {"out.journal", "out.prune-gram"}
    assert journals.read(tmp_path / "out.journal")["position"] > 0
    assert "give --resume to go on from it" in run(*command).error
    with monkeypatch.context() as patched:
        patched.setattr("reap_driver.workflow.observe.run_resident", lambda run: None)
        assert run(*command, "--resume").code == 0
    assert content(tmp_path / "out") == whole
    assert left(tmp_path) == {"out"}


def test_ranks_share_it(words: list[str], whole: dict[str, bytes], tmp_path: Path) -> None:
    command = ["prune", *words, "--shape", "6x16", "--out", str(tmp_path / "out")]
    ended = ranked(2, lambda: main(command))
    assert ended.code == 0, ended.err
    assert left(tmp_path) == {"out"}
    mine, theirs = (
        rd.load_model(folder).state_dict()
        for folder in (tmp_path / "out", Path(words[0]).with_name("cut"))
    )
    assert mine.keys() == theirs.keys()
    plan = rd.Plan.load(tmp_path / "out/reap/plan.json")
    assert {layer.narrow_width for layer in plan.layers.values()} == {16}


REFUSED = {
    "ratio": (["--shape", "6x16", "--ratio", "0.5"], 2, "so --ratio cannot; give one of them"),
    "skip": (["--shape", "auto", "--skip-last", "1"], 2, "--skip-last: not together with --shape"),
    "width": (["--shape", "6x20"], 3, "cannot keep 20 neurons per expert"),
    "nothing": (["--shape", "8x24"], 3, "removes nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_model_runs(run: Run, words: list[str], tmp_path: Path, name) -> None:
    options, code, text = REFUSED[name]
    ended = run("prune", *words, *options, "--out", tmp_path / "out")
    assert ended.code == code
    assert text in ended.error
    assert not list(tmp_path.iterdir())
    dry = run("prune", *words, *options, "--dry-run")
    assert dry.code == code
    assert text in dry.error


@pytest.mark.parametrize("name", ["out.prune-gram", "out.prune-matrices"])
def test_folders_of_others_are_kept(run: Run, words: list[str], tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    ended = run("prune", *words, "--shape", "6x16", "--out", tmp_path / "out")
    assert ended.code == 3
    assert f"{name}: exists and is no folder of" in ended.error
    assert (tmp_path / name / "mine").exists()


def test_dry_run_states_memory_disk_and_sizes(run: Run, three_deep: Path, words: list[str]) -> None:
    words = [str(three_deep), "--dry-run", "--tokens", "1000"]
    facts = run("prune", *words, "--shape", "6x16", "--json").json
    assert set(map(tuple, facts["pruned"]["neurons_by_layer"].values())) == {(24, 16)}
    assert facts["pruned"]["ratio"] == 0.5
    assert facts["gram"]["disk_bytes"] > 0
    assert "Gram matrices" in facts["decision"]["host_parts"]
    auto = run("prune", *words, "--shape", "auto", "--width-multiple", 4)
    assert "the run chooses from 8x12, 6x16, 4x24; these sizes are of 8x12" in auto.err
    assert "gram" not in run("prune", *words, "--ratio", 0.5, "--json").json
    assert max(map(len, auto.out.splitlines())) <= 80


def test_dry_run_refuses_quantized_models(run: Run) -> None:
    """By the configuration alone, as the run would."""
    words = ["prune", CONFIGS / "deepseek-v3.2.json", "--dry-run", "--tokens", "1M"]
    machine = ["--machine", "8xH200-141GB,ram=2TB,free=4TB"]
    ended = run(*words, *machine, "--shape", "auto")
    assert ended.code == 3
    assert "is quantized (quant_method is 'fp8'" in ended.error
