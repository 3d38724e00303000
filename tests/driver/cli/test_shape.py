"""`plan --shape`: the experts that stay lose neurons, and the checkpoint has what was solved."""

import json
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import reap_driver as rd
from reap_driver.compensation.shaping import Shaping
from reap_driver.load.experts import read_experts
from reap_driver.load.streamed_model import StreamedModel
from tests.driver.cli.conftest import Run, write_data, write_model
from tests.driver.writer import saved

LAYERS, EXPERTS, WIDTH = 3, 8, 24


@dataclass(frozen=True)
class Seen:
    """A model that was observed."""

    model: Path
    stats: Path
    gram: Path


def observe(folder: Path, name: str, **overrides: Any) -> Seen:
    """A tiny model of the zoo, its statistics and Gram matrices."""
    folder.mkdir()
    seen = Seen(folder / "model", folder / "stats", folder / "sums")
    write_model(seen.model, name, **overrides)
    data = write_data(folder / "code.jsonl")
    rd.observe_data(seen.model, data, out=seen.stats, gram=seen.gram, seq_len=64)
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """8 experts of 24 neurons, 3 a token, in three layers; read only."""
    folder = tmp_path_factory.mktemp("seen") / "plain"
    return observe(folder, "qwen3_moe", num_hidden_layers=LAYERS)


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 35)[None]).logits


@torch.no_grad()
def test_plan_then_apply(run: Run, seen: Seen, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    made = run("plan", seen.stats, "--shape", "6x16", "--gram", seen.gram, "--out", out)
    assert made.code == 0, made.err
    assert "keeps 6 of 8 experts in each of 3 layers, with 16 of 24 neurons of each" in made.out
    plan, matrices = rd.Plan.load(out), rd.Matrices.open(tmp_path / "plan.matrices")
    assert plan.shape == "6x16"
    assert plan.settings == {"shape": "6x16", "ridge": 1e-3}
    assert plan.ratio == 0.5
    assert plan.matrices == {"digest": matrices.digest}
    assert plan.kept == rd.plan(seen.stats, keep=6).plan.kept

    model, grams = rd.load_model(seen.model), rd.GramFolder.open(seen.gram)
    for name, layer in plan.layers.items():
        down = model.get_submodule(name).down_proj.detach()
        cut = rd.prune_width(down, grams.get(name), 16, experts=layer.kept)
        assert layer.neurons == tuple(map(tuple, cut.neurons.tolist()))
        assert torch.equal(matrices[name], cut.down)

    assert run("apply", seen.model, out, "--out", tmp_path / "cut").code == 0
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert (narrow.config.num_experts, narrow.config.moe_intermediate_size) == (6, 16)
    before = logits(model)
    with rd.compensated(model, plan, matrices):
        expected = logits(model)
    torch.testing.assert_close(logits(narrow), expected, rtol=5e-5, atol=5e-5)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_in_python_and_again_it_has_the_same_bits(seen: Seen, tmp_path: Path) -> None:
    options = {"shape": "8x16", "gram": seen.gram, "ridge": 0.01, "width_multiple": 4}
    found = rd.plan(seen.stats, out=tmp_path / "a.json", **options)
    assert found.facts()["shape"] == "8x16"
    assert found.plan.settings == {"shape": "8x16", "ridge": 0.01, "width_multiple": 4}
    again = rd.plan(seen.stats, out=tmp_path / "b.json", model=seen.model, **options).plan
    assert again == found.plan == rd.Plan.load(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.json",
        "a.matrices",
        "b.json",
        "b.matrices",
    ]


def test_auto_takes_the_least_expected_error(run: Run, seen: Seen, tmp_path: Path) -> None:
    words = ["plan", seen.stats, "--gram", seen.gram, "--shape", "auto"]
    made = run(*words, "--width-multiple", 4, "--ratio", 0.5, "--out", tmp_path / "plan.json")
    assert made.code == 0, made.err
    said = re.search(r"chose (\S+), of the least expected error: (.*) \(size", made.err)
    assert said is not None
    errors = dict(text.split() for text in said[2].split(", "))
    assert set(errors) == {"8x12", "6x16", "4x24"}
    assert list(map(float, errors.values())) == sorted(map(float, errors.values()))
    plan = rd.Plan.load(tmp_path / "plan.json")
    assert said[1] == next(iter(errors)) == plan.shape
    assert plan.settings == {"shape": "auto", "ridge": 1e-3, "width_multiple": 4}
    assert said[0] in "\n".join(plan.notes)
    held = run(*words, "--protect", "0:0,1,2,3,4", "--out", tmp_path / "held.json")
    assert held.code == 0, held.err
    assert "4x24" not in held.err
    assert set(range(5)) <= set(
        rd.Plan.load(tmp_path / "held.json").layers[next(iter(plan.layers))].kept
    )


def test_whole_experts_need_no_matrices(run: Run, seen: Seen, tmp_path: Path) -> None:
    made = run(
        "plan", seen.stats, "--gram", seen.gram, "--shape", "4x24", "--out", tmp_path / "plan.json"
    )
    assert made.code == 0, made.err
    plan = rd.Plan.load(tmp_path / "plan.json")
    assert plan.layers == rd.plan(seen.stats, 0.5).plan.layers
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert "4x24 has all neurons of its experts, so these stay as they are" in made.err
    few = run(
        *("plan", seen.stats, "--gram", seen.gram, "--shape", "auto", "--ratio", 0.2),
        *("--width-multiple", 23, "--out", tmp_path / "few.json"),
    )
    assert "6x24 is the only shape of this size; a smaller --width-multiple allows" in few.err


def test_routing_groups_stay_equal(run: Run, tmp_path: Path) -> None:
    deep = observe(tmp_path / "a", "deepseek_v3", n_routed_experts=16, n_group=4, topk_group=2)
    words = ["plan", deep.stats, "--gram", deep.gram, "--out", tmp_path / "plan.json"]
    assert "in steps of 4; use 8 or 12" in run(*words, "--shape", "10x16").error
    assert run(*words, "--shape", "12x16").code == 0
    [layer, *_] = rd.Plan.load(tmp_path / "plan.json").layers.values()
    assert [sum(e // 4 == group for e in layer.kept) for group in range(4)] == [3] * 4
    assert run("apply", deep.model, tmp_path / "plan.json", "--out", tmp_path / "cut").code == 0


def test_what_the_gram_matrices_do_not_know_is_said(
    run: Run, seen: Seen, data: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"input_ids": list(range(40))}) + "\n")
    other = tmp_path / "other"
    rd.observe_data(seen.model, few, out=tmp_path / "s", gram=other, seq_len=40)
    words = ["plan", seen.stats, "--shape", "6x16", "--out", tmp_path / "plan.json"]
    made = run(*words, "--gram", other, "--weights", "code=1")
    assert made.code == 0, made.err
    assert "of other data than the statistics" in made.err
    assert "weights of groups decide which experts stay" in made.err
    assert re.search(r"\d+ experts have fewer than 48 rows, twice their width", made.err)
    notes = "\n".join(rd.Plan.load(tmp_path / "plan.json").notes)
    assert "fewer than 48 rows" in notes
    again = run(*words, "--gram", seen.gram, "--overwrite")
    assert "of other data" not in again.err
    assert "weights of groups" not in again.err


OPTIONS = {
    "ratio": (["--ratio", 0.5], "--shape 6x16: says how much stays, so --ratio cannot"),
    "keep": (["--keep", 4], "--shape 6x16: says how much stays, so --keep cannot"),
    "auto keep": (["--shape", "auto", "--keep", 4], "--shape auto: not together with --keep"),
    "auto size": (["--shape", "auto", "--fits", "1GB"], "--shape auto: not together with --fits"),
    "skip": (["--skip-first", 1], "--skip-first: not together with --shape 6x16"),
    "last": (["--skip-last", 1], "--skip-last: not together with --shape 6x16"),
    "layers": (["--layer-ratios", "x.yaml"], "--layer-ratios: not together with --shape 6x16"),
    "global": (["--allocation", "global"], "--allocation global: not together with --shape"),
    "text": (["--shape", "half"], "--shape half: give auto, or experts and neurons"),
    "multiple": (["--width-multiple", 5], "16 neurons are not a multiple of --width-multiple 5"),
    "number": (["--ridge", "x"], "'x' is no number"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_contradict_a_shape(run: Run, seen: Seen, tmp_path: Path, name: str) -> None:
    words, text = OPTIONS[name]
    base = ["plan", seen.stats, "--gram", seen.gram, "--out", tmp_path / "p", "--shape", "6x16"]
    ended = run(*base, *words)
    assert ended.code == 2
    assert text in ended.error
    assert not list(tmp_path.iterdir())


def test_a_shape_and_gram_matrices_go_together(run: Run, seen: Seen, tmp_path: Path) -> None:
    words = ["plan", seen.stats, "--out", tmp_path / "plan.json"]
    assert "--shape 6x16: needs --gram" in run(*words, "--shape", "6x16").error
    assert "--gram x: only with --shape" in run(*words, "--gram", "x").error
    with pytest.raises(rd.OptionError, match="needs `out`, beside which"):
        rd.plan(seen.stats, shape="6x16", gram=seen.gram)


def without_a_layer(seen: Seen, folder: Path) -> None:
    """Gram matrices of all layers but the last."""
    full = rd.GramFolder.open(seen.gram)
    writer = rd.GramWriter(folder, list(full.layers))
    for name in list(full.layers)[:-1]:
        writer.put(name, full.get(name))
    writer.finish(full.provenance)


def of_another_model(_: Seen, folder: Path) -> None:
    other = observe(folder.with_name("other"), "qwen3_moe", num_hidden_layers=LAYERS, num_experts=6)
    other.gram.rename(folder)


def not_positive(seen: Seen, folder: Path) -> None:
    """A folder with a Gram that is not positive semidefinite."""
    full = rd.GramFolder.open(seen.gram)
    writer = rd.GramWriter(folder, list(full.layers))
    for name in full.layers:
        sums = full.get(name)
        sums.gram[1].mul_(-1)
        writer.put(name, sums)
    writer.finish(full.provenance)


def as_it_is(seen: Seen, folder: Path) -> None:
    shutil.copytree(seen.gram, folder)


REFUSED: dict[str, tuple[Callable[[Seen, Path], Any], list[str], str]] = {
    "missing": (lambda *_: None, [], "sums is missing; make one with `reap-kernels observe --gram"),
    "another": (of_another_model, [], "is not of .*model: .*num_experts .* give the Gram matrices"),
    "layer": (without_a_layer, [], "has no Gram matrices of layer model.layers.2.mlp"),
    "singular": (not_positive, [], r"layer model.layers.\d.mlp.experts: the Gram of expert 1 is"),
    "width": (as_it_is, ["--shape", "6x20"], "cannot keep 20 neurons .* use 16 or 24"),
    "experts": (as_it_is, ["--shape", "2x16"], "cannot keep 2 experts"),
    "nothing": (as_it_is, ["--shape", "8x24"], "removes nothing"),
    "protected": (as_it_is, ["--protect", "0:0,1,2,3,4,5,6"], "7 of its experts are protected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_leaves_nothing(run: Run, seen: Seen, tmp_path: Path, name) -> None:
    make, words, text = REFUSED[name]
    make(seen, tmp_path / "sums")
    base = ["plan", seen.stats, "--gram", tmp_path / "sums", "--out", tmp_path / "plan.json"]
    ended = run(*base, "--shape", "6x16", *words)
    assert ended.code == 3
    assert re.search(text, ended.error), ended.error
    assert not list(tmp_path.glob("plan*"))


def test_what_the_writer_refuses_is_said_first(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One field sizes the experts of jamba and its dense layers; nothing is solved for that."""
    jamba = observe(tmp_path / "a", "jamba")
    monkeypatch.setattr("reap_driver.workflow.shape_plans._solve", None)
    words = ["plan", jamba.stats, "--gram", jamba.gram, "--out", tmp_path / "plan.json"]
    ended = run(*words, "--shape", "6x16")
    assert "layers.0.feed_forward.gate_proj" in ended.error
    seen = observe(tmp_path / "b", "qwen3_moe")
    saved.change_config(seen.model, quantization_config={"quant_method": "gptq", "bits": 4})
    words = ["plan", seen.stats, "--gram", seen.gram, "--out", tmp_path / "plan.json"]
    assert run(*words, "--shape", "6x16").code == 3
    assert not list(tmp_path.glob("plan*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_end_in_between_leaves_nothing(
    run: Run, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error
) -> None:
    """Neither a plan without its matrices nor the reverse; what a kill left is cleared away."""
    put, done = rd.Matrices.put, []

    def ending(self: rd.Matrices, name: str, down: torch.Tensor) -> None:
        if done:
            raise error
        put(self, name, down)
        done.append(name)

    words = ["plan", seen.stats, "--gram", seen.gram, "--shape", "6x16", "--out"]
    with monkeypatch.context() as patched:
        patched.setattr(rd.Matrices, "put", ending)
        ended = run(*words, tmp_path / "plan.json")
    assert ended.code == (130 if error is KeyboardInterrupt else 4)
    assert done
    assert not list(tmp_path.iterdir())
    rd.Matrices.create(tmp_path / "plan.matrices.partial", model={}).put("x", torch.ones(1, 1, 1))
    assert run(*words, tmp_path / "plan.json").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.matrices"]


def test_outputs_are_replaced_only_on_request(run: Run, seen: Seen, tmp_path: Path) -> None:
    out, folder = tmp_path / "plan.json", tmp_path / "plan.matrices"
    words = ["plan", seen.stats, "--gram", seen.gram, "--out", out, "--shape"]
    assert run(*words, "6x16").code == 0
    out.unlink()
    assert "plan.matrices: exists; choose another name" in run(*words, "8x16").error
    assert run(*words, "8x16", "--overwrite").code == 0
    assert rd.Plan.load(out).matrices == {"digest": rd.Matrices.open(folder).digest}
    shutil.rmtree(folder)
    folder.mkdir()
    ended = run(*words, "6x16", "--overwrite")
    assert "is no folder of down projections" in ended.error
    folder.rmdir()
    part = tmp_path / "plan.matrices.partial"
    part.mkdir()
    (part / "mine.txt").touch()
    assert "holds 'mine.txt', which is none" in run(*words, "6x16", "--overwrite").error
    assert rd.Plan.load(out).shape == "8x16"


def test_experts_are_read_with_one_layer_in_memory(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    for method in ("ready", "release"):
        plain = getattr(StreamedModel, method)

        def noted(self: StreamedModel, layer: int, method: str = method, plain: Any = plain) -> Any:
            events.append((method, layer))
            return plain(self, layer)

        monkeypatch.setattr(StreamedModel, method, noted)
    model = rd.load_model(seen.model)
    names = [layer.name for layer in rd.find_moe_layers(model)][1:]
    events.clear()
    found = {}
    for name, weights in read_experts(seen.model, names):
        assert torch.equal(weights.down, model.get_submodule(name).down_proj)
        found[name] = weights.intermediate_size
    assert found == dict.fromkeys(names, WIDTH)
    assert events == [("ready", 1), ("release", 1), ("ready", 2), ("release", 2)]


@pytest.mark.parametrize("shape", ["6x16", "auto"])
def test_a_layer_is_given_up_before_the_next_is_loaded(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """Neither its matrices nor its Gram are held while the next one is read."""
    used: list[weakref.ref[Any]] = []
    measure, ready, alive = Shaping.measure, StreamedModel.ready, []

    def measured(self: Shaping, name: str, down: Any, gram: Any, least: int) -> None:
        used.extend(map(weakref.ref, (down[0], gram)))
        measure(self, name, down, gram, least)

    def loaded(self: StreamedModel, layer: int) -> bool:
        alive.append(sum(one() is not None for one in used))
        return ready(self, layer)

    monkeypatch.setattr(Shaping, "measure", measured)
    monkeypatch.setattr(StreamedModel, "ready", loaded)
    rd.plan(seen.stats, gram=seen.gram, shape=shape, out=tmp_path / "plan.json")
    assert len(used) == 2 * LAYERS
    assert alive == [0] * len(alive)
    assert len(alive) >= LAYERS
