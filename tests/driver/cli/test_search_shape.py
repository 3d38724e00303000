"""`search --shape`: the best of some shapes, and its matrices; interrupted, resumed and refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import reap_driver as rd
from reap_driver.memory.host_memory import Free
from reap_driver.plan_search.search_state import read
from reap_driver.plan_search.shape_task import ShapeTask
from reap_driver.workflow import search_shapes
from tests.driver.cli.conftest import Run, write_data, write_model
from tests.driver.cli.forks import forked, signalled_behind
from tests.driver.cli.test_shape import Seen, of_another_model, without_a_layer

COMMON = ("--seq-len", 16, "--ratio", 0.5, "--batch-size", 4, "--shape", "auto")
SHAPES = ["4x24", "8x12", "6x16", "5x18", "4x22"]  # of 8 experts of 24 neurons, multiples of 2


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A model of two layers, its statistics and Gram matrices; read only."""
    folder = tmp_path_factory.mktemp("seen")
    found = Seen(folder / "model", folder / "stats", folder / "sums")
    write_model(found.model, "qwen3_moe")
    text = write_data(folder / "code.jsonl")
    rd.observe_data(found.model, text, out=found.stats, gram=found.gram, seq_len=32)
    return found


@pytest.fixture
def words(seen: Seen, data: Path) -> list[Any]:
    """The command without --out."""
    base = ["search", seen.model, seen.stats, "--gram", seen.gram, "--data", data, *COMMON]
    return [*base, "--width-multiple", 2]


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files by name, but for locks."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def outputs(folder: Path) -> list[str]:
    """Names of all that the command may have written there, but for locks."""
    names = [path.name for path in folder.iterdir() if path.suffix != ".lock"]
    return sorted(name for name in names if name.startswith(("plan", ".plan")))


@torch.no_grad()
def test_a_plan_and_what_it_is_worth(
    run: Run, seen: Seen, words: Any, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    outcome = run(*words, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    plan, matrices, said = (
        rd.Plan.load(out),
        rd.Matrices.open(tmp_path / "plan.matrices"),
        outcome.json,
    )
    tried = {one["shape"]: one for one in said["tried"]}
    assert sorted(tried) == sorted(SHAPES)
    assert said["evaluations"] == len(SHAPES)
    assert next(iter(tried)) == "4x24", "the cut of whole experts is tried first"
    best = max(tried.values(), key=lambda one: one["acceptance"])
    assert plan.shape == said["shape"] == best["shape"] != "4x24"
    assert said["acceptance"] == {
        "searched": best["acceptance"],
        "uniform": tried["4x24"]["acceptance"],
    }
    assert plan.matrices == {"digest": matrices.digest}
    assert plan.settings == {"shape": "auto", "width_multiple": 2, "ridge": 1e-3}
    held = said["held_out"]
    assert held["difference_low"] <= held["searched"] - held["uniform"] <= held["difference_high"]
    notes = "\n".join(plan.notes)
    assert "of the cut of whole experts" in notes
    assert all(f"{one['shape']}: {one['expected_error']:.4f}, " in notes for one in tried.values())
    assert "trying a shape takes up to" in outcome.err
    assert outputs(tmp_path) == ["plan.json", "plan.matrices"]

    assert run("apply", seen.model, out, "--out", tmp_path / "cut").code == 0
    narrow, model = (
        AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "cut", seen.model)
    )
    assert f"{narrow.config.num_experts}x{narrow.config.moe_intermediate_size}" == plan.shape
    ids = torch.arange(3, 35)[None]
    with rd.compensated(model, plan, matrices):
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(narrow(input_ids=ids).logits, expected, rtol=5e-5, atol=5e-5)


def test_in_python_it_is_the_same(
    seen: Seen, words: Any, data: Path, tmp_path: Path, run: Run
) -> None:
    outcome = run(*words, "--out", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.err
    out = tmp_path / "plan-2.json"
    options = {"shape": "auto", "width_multiple": 2, "seq_len": 16, "batch_size": 4}
    found = rd.search(seen.model, seen.stats, data, 0.5, out=out, gram=seen.gram, **options)
    assert isinstance(found, rd.Searched)
    assert found.plan == rd.Plan.load(out) == rd.Plan.load(tmp_path / "plan.json")
    assert isinstance(found.found, rd.FoundShape)
    assert str(found.found.tried[0].shape) == "4x24"
    _, head, *rows = found.describe().splitlines()
    assert head.split() == ["tried", "expected", "error", "acceptance"]
    for row, one in zip(rows, found.found.tried, strict=True):
        shape, *figures = row.split()[:3]
        assert shape == str(one.shape)
        assert figures == [f"{one.expected_error:.4f}", f"{one.acceptance:.4f}"]
    assert rows[0].endswith("cut of whole experts")
    assert [row.split()[0] for row in rows if row.endswith("chosen")] == [found.plan.shape]
    assert found.describe() in outcome.out
    assert outcome.err.count("6x16: ") == 0, "the table is shown once"


def test_whole_experts_need_no_matrices(
    run: Run, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShapeTask, "measured", lambda *_: lambda shape: shape[1] / 100)
    outcome = run(*words, "--out", tmp_path / "plan.json", "--json")
    assert outcome.code == 0, outcome.err
    plan = rd.Plan.load(tmp_path / "plan.json")
    assert (plan.shape, plan.narrows, outcome.json["held_out"]) == (None, False, None)
    assert "the cut of whole experts, so no neurons are removed" in "\n".join(plan.notes)
    assert outputs(tmp_path) == ["plan.json"]


def test_protected_experts_stay(run: Run, words: Any, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    outcome = run(*words, "--protect", "0:0,1,2,3,4", "--out", out, "--json")
    assert outcome.code == 3, "five of the four experts that the cut of whole ones keeps"
    outcome = run(*words, "--protect", "0:0,1,2,3", "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    plan = rd.Plan.load(out)
    name = next(iter(plan.layers))
    assert {0, 1, 2, 3} <= set(plan.kept[name])
    assert plan.settings["protected"] == {name: [0, 1, 2, 3]}


def test_without_validation_nothing_is_held_out(run: Run, words: Any, tmp_path: Path) -> None:
    outcome = run(*words, "--validation", 0, "--out", tmp_path / "plan.json", "--json")
    assert (outcome.code, outcome.json["held_out"]) == (0, None)


def test_killed_and_interrupted_searches_go_on_to_the_same_bits(
    run: Run, words: Any, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    folder.mkdir()
    assert run(*words, "--out", whole / "plan.json").code == 0
    state = folder / "plan.json.search"
    command = [*map(str, words), "--out", str(folder / "plan.json")]
    for known, (number, code) in enumerate(((signal.SIGKILL, -9), (signal.SIGINT, 130)), 1):
        resume = ["--resume"] if known > 1 else []
        ended = forked([*command, *resume], signalled_behind(known, number))
        assert ended.code == code, ended.err
        assert len(read(state).evaluated) == (1, 3)[known - 1]
        assert outputs(folder) == ["plan.json.search"]
    assert f"interrupted after 3 candidates; they are saved in {state}: run the" in ended.err
    assert '"shape"' in state.read_text()
    outcome = run(*words, "--out", folder / "plan.json", "--resume")
    assert outcome.code == 0, outcome.err
    assert files(folder) == files(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_ended_while_matrices_are_written(
    run: Run, words: Any, tmp_path: Path, number: int, code: int
) -> None:
    """What a kill left of them is replaced; the shapes are not tried again."""
    out, state = tmp_path / "plan.json", tmp_path / "plan.json.search"
    put = rd.Matrices.put

    def dying() -> None:
        def ended(self: rd.Matrices, name: str, down: torch.Tensor) -> None:
            put(self, name, down)
            os.kill(os.getpid(), number)

        rd.Matrices.put = ended

    ended = forked([*map(str, words), "--out", str(out)], dying)
    assert ended.code == code, ended.err
    left = ["plan.matrices.partial"] if number == signal.SIGKILL else []
    assert outputs(tmp_path) == ["plan.json.search", *left]
    known = read(state).evaluated
    assert len(known) == len(SHAPES)

    def nothing_is_tried(*_: Any) -> Any:
        raise AssertionError("a shape was tried again")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ShapeTask, "measured", lambda *_: nothing_is_tried)
        outcome = run(*words, "--out", out, "--resume", "auto")
    assert outcome.code == 0, outcome.err
    assert rd.Plan.load(out).shape == "x".join(map(str, max(known, key=known.__getitem__)))
    assert outputs(tmp_path) == ["plan.json", "plan.matrices"]


def test_interrupted_before_a_shape_was_tried(
    run: Run, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = ShapeTask.measure

    def interrupting(self: ShapeTask, name: str) -> None:
        measure(self, name)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ShapeTask, "measure", interrupting)
    ended = run(*words, "--out", tmp_path / "plan.json")
    assert ended.code == 130
    assert "interrupted before a shape was tried" in ended.err
    assert not outputs(tmp_path)


def test_one_fixed_command(run: Run, words: Any, tmp_path: Path) -> None:
    """With --resume auto it begins, and finds its plan complete, if its matrices are there."""
    out, folder = tmp_path / "plan.json", tmp_path / "plan.matrices"
    command = [*words, "--out", out, "--resume", "auto"]
    assert run(*command).code == 0
    found = files(tmp_path)
    again = run(*command)
    assert again.out == f"{out} is complete, made by this command; nothing to do\n"
    assert files(tmp_path) == found
    refused = run(*command, "--ridge", 0.01)
    assert "was made by another command: ridge was 0.001, now it is 0.01" in refused.error
    shutil.rmtree(folder)
    assert "is no folder of them" in run(*command).error
    assert run(*command, "--overwrite").code == 0
    assert files(tmp_path) == found


def test_outputs_are_replaced_only_on_request(run: Run, words: Any, tmp_path: Path) -> None:
    out, folder = tmp_path / "plan.json", tmp_path / "plan.matrices"
    folder.mkdir()
    command = [*words, "--out", out]
    assert "is no folder of down projections" in run(*command, "--overwrite").error
    folder.rmdir()
    assert run(*command).code == 0
    out.unlink()
    assert "plan.matrices: exists; choose another name" in run(*command).error
    assert run(*command, "--overwrite").code == 0
    assert rd.Plan.load(out).matrices == {"digest": rd.Matrices.open(folder).digest}


OPTIONS = {
    "given": (["--shape", "6x16"], "--shape 6x16: a search finds the shape; give auto, or plan"),
    "text": (["--shape", "half"], "--shape half: give auto"),
    "evaluations": (["--evaluations", 9], "--evaluations 9: not together with --shape, of which"),
    "generations": (["--generations", 2], "--generations 2: not together with --shape"),
    "population": (["--population", 8], "--population 8: not together with --shape"),
    "elites": (["--elites", 2], "--elites 2: not together with --shape"),
    "keep": (["--keep", 4], "--shape auto: not together with --keep"),
    "skip": (["--skip-first", 1], "--skip-first: not together with --shape auto"),
    "layers": (["--layer-ratios", "x.yaml"], "--layer-ratios: not together with --shape auto"),
    "ridge": (["--ridge", 0], "--ridge 0: give a number above 0"),
    "allocation": (["--allocation", "global"], "unrecognized arguments: --allocation"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_contradict_it(run: Run, words: Any, tmp_path: Path, name: str) -> None:
    more, text = OPTIONS[name]
    base = words if name != "keep" else [w for w in words if w not in ("--ratio", 0.5)]
    ended = run(*base, *more, "--out", tmp_path / "plan.json")
    assert (ended.code, text in ended.error) == (2, True), ended.error
    assert not outputs(tmp_path)


def test_shape_and_gram_matrices_go_together(
    run: Run, seen: Seen, data: Path, tmp_path: Path
) -> None:
    base = ["search", seen.model, seen.stats, "--data", data, "--out", tmp_path / "plan.json"]
    assert "--shape auto: needs --gram" in run(*base, "--shape", "auto").error
    assert "--gram x: only with --shape" in run(*base, "--gram", "x").error
    assert "--width-multiple 2: only with --shape" in run(*base, "--width-multiple", 2).error
    with pytest.raises(rd.OptionError, match="needs `out`, beside which"):
        rd.search(seen.model, seen.stats, data, shape="auto", gram=seen.gram)


def damaged(seen: Seen, folder: Path) -> None:
    """Gram matrices with a file whose last bytes differ."""
    shutil.copytree(seen.gram, folder)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)


def unfinished(seen: Seen, folder: Path) -> None:
    shutil.copytree(seen.gram, folder)
    (folder / "gram.json").unlink()


REFUSED: dict[str, tuple[Callable[[Seen, Path], Any], list[Any], str]] = {
    "missing": (lambda *_: None, [], "sums is missing; make one with `reap-kernels observe --gram"),
    "unfinished": (unfinished, [], "or still being written"),
    "another": (of_another_model, [], "give the Gram matrices of this model"),
    "layer": (without_a_layer, [], "has no Gram matrices of layer"),
    "damaged": (damaged, [], "damaged"),
    "ratio": (shutil.copytree, ["--ratio", 0.99], "leaves 1, but the router chooses 3"),
    "widths": (shutil.copytree, ["--width-multiple", 20], "no shape but whole experts has that"),
    "text": (shutil.copytree, ["--seq-len", 256, "--validation", 0.95], "too few to hold out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_leaves_nothing(
    run: Run, seen: Seen, words: Any, tmp_path: Path, name: str
) -> None:
    make, more, text = REFUSED[name]
    own = tmp_path / "sums"
    if make is shutil.copytree:
        shutil.copytree(seen.gram, own)
    else:
        make(seen, own)
    ended = run(*words, "--gram", own, *more, "--out", tmp_path / "plan.json")
    assert (ended.code, text in ended.error) == (3, True), ended.error
    assert not outputs(tmp_path)


def test_what_the_writer_refuses_is_said_first(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One field sizes the experts of jamba and its dense layers; nothing is tried for that."""
    folder = tmp_path / "jamba"
    jamba = Seen(folder / "model", folder / "stats", folder / "sums")
    folder.mkdir()
    write_model(jamba.model, "jamba")
    rd.observe_data(jamba.model, data, out=jamba.stats, gram=jamba.gram, seq_len=32)
    monkeypatch.setattr(search_shapes, "ShapeTask", None)
    base = ["search", jamba.model, jamba.stats, "--gram", jamba.gram, "--data", data, *COMMON]
    ended = run(*base, "--width-multiple", 4, "--out", tmp_path / "plan.json")
    assert "feed_forward" in ended.error


def test_a_disk_without_room_is_refused(
    run: Run, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_shapes, "free_disk", lambda _: Free(1000, "by a test"))
    ended = run(*words, "--out", tmp_path / "plan.json")
    assert (ended.code, "1.00 kB are free (by a test); free some space" in ended.error) == (4, True)


def test_gram_matrices_of_other_data_are_said(
    run: Run, seen: Seen, words: Any, tmp_path: Path
) -> None:
    other = tmp_path / "few.jsonl"
    other.write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    rd.observe_data(seen.model, other, out=tmp_path / "s", gram=tmp_path / "sums", seq_len=40)
    made = run(*words, "--gram", tmp_path / "sums", "--out", tmp_path / "plan.json")
    assert made.code == 0, made.err
    assert "of other data than the statistics" in made.err
