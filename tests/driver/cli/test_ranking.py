"""The options that say which experts go: plans from a statistics file, and pruning with them."""

import json
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
from reap_driver.planning.selection import super_experts
from reap_driver.planning.stability import keep_probability, margin
from tests.driver.cli.conftest import Run
from tests.driver.planning.statistics import EXPERTS, Rows, in_parts, model_stats

LAYERS = [f"model.layers.{n}.mlp.experts" for n in range(1, 5)]


def statistics(parts: int, **facts: int) -> rd.SaliencyStats:
    """Four layers of six experts, two groups, in equal parts or undivided."""
    found = []
    for part in range(max(1, parts)):
        rows = {name: Rows(2, 10 * part + place) for place, name in enumerate(LAYERS)}
        found.append(model_stats(rows, ["code", "tools"], top_k=1, **facts))
    whole = in_parts(found)
    return whole if parts else rd.SaliencyStats(whole.layers, whole.groups, whole.provenance)


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    """Statistics in five parts."""
    path = tmp_path / "stats.safetensors"
    statistics(5).save(path)
    return path


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("weights", [None, {"code": 0.7, "tools": 0.3}])
@pytest.mark.parametrize("criterion", ["reap", "S(0.5,1,1)", "max_activation", "random:3"])
def test_plans_are_those_of_python(
    run: Run, stats: Path, allocation: str, weights: dict[str, float] | None, criterion: str
) -> None:
    out = stats.with_name("plan.json")
    words: list[Any] = ["--allocation", allocation, "--criterion", criterion, "--ratio", 0.4]
    words += ["--weights", "code=0.7,tools=0.3"] if weights else []
    done = run("plan", stats, "--out", out, *words, "--json")
    assert done.code == 0, done.err
    loaded = rd.SaliencyStats.load(stats)
    expected = rd.make_plan(rd.score(loaded, criterion, weights), 0.4, allocation=allocation)
    assert rd.Plan.load(out) == expected
    facts = done.json
    assert facts["allocation"] == allocation
    assert facts["kept_by_layer"] == {name: len(ids) for name, ids in expected.kept.items()}
    assert facts["uniform"] is expected.uniform
    assert facts["removed"] == (4 * 2 if allocation == "uniform" else int(24 * 0.4))
    if criterion in ("max_activation", "random:3"):
        assert "margin" not in facts
    else:
        inside = margin(keep_probability(loaded, expected))
        assert facts["margin"] == {name: list(ids) for name, ids in inside.items()}
        experts = sum(map(len, inside.values()))
        assert f"{experts} of 24 experts, in {len(inside)} layers, are inside the" in done.err
        assert "a probability between 2.5% and 97.5% (as 5 parts of it differ)" in done.err


def test_undivided_statistics_say_nothing_about_the_margin(run: Run, tmp_path: Path) -> None:
    statistics(0).save(tmp_path / "s")
    done = run("plan", tmp_path / "s", "--out", tmp_path / "p", "--json")
    assert "margin" not in done.json
    assert "margin" not in done.err


def test_a_margin_that_cannot_be_told_is_no_obstacle(run: Run, tmp_path: Path) -> None:
    whole = statistics(2)
    empty = {name: Rows(2, 0, rows=0) for name in LAYERS}
    for rows in empty.values():
        rows.tokens[:] = 0
    parts = [statistics(0), model_stats(empty, ["code", "tools"], top_k=1)]
    whole = rd.SaliencyStats(parts[0].layers, whole.groups, whole.provenance, parts)
    whole.save(tmp_path / "s")
    done = run("plan", tmp_path / "s", "--out", tmp_path / "p")
    assert done.code == 0
    assert "note: how sure the plan is cannot be told: layer model.layers.1" in done.err


def test_protection_ratios_and_skipped_layers(run: Run, stats: Path) -> None:
    out, guarded = stats.with_name("plan.json"), stats.with_name("guarded.yaml")
    ratios = stats.with_name("ratios.json")
    guarded.write_text("4: [5]\n'*.2.*': 4\n")
    ratios.write_text(json.dumps({"*": 0.2, "3": 0.7, LAYERS[3]: 0.8}))
    words = ("--protect", "1:0,4", "--protect", guarded, "--layer-ratios", ratios)
    done = run("plan", stats, "--out", out, *words, "--skip-first", 1, "--skip-last", 1)
    assert done.code == 0, done.err
    plan = rd.Plan.load(out)
    assert [len(ids) for ids in plan.kept.values()] == [6, 5, 2, 6]
    assert 4 in plan.kept[LAYERS[1]]
    assert plan.settings == {
        "layer_ratios": {LAYERS[0]: 0, LAYERS[1]: 0.2, LAYERS[2]: 0.7, LAYERS[3]: 0},
        "protected": {LAYERS[0]: [0, 4], LAYERS[1]: [4], LAYERS[3]: [5]},
    }
    assert (
        "keeps 19 of 24 experts, from 2 to 6 in each of 4 layers; 4 of them protected" in done.out
    )
    assert "layers keep from 2 to 6 experts: transformers' own" in done.err
    assert "surest to have kernels" not in done.err


def test_super_experts_stay(run: Run, stats: Path) -> None:
    loaded = rd.SaliencyStats.load(stats)
    [(layer, [expert])] = super_experts(rd.score(loaded, "max_activation")).items()
    loaded.layers[layer].weighted_norm_sum[:, expert] = 0  # the lowest score there is
    for part in loaded.parts:
        part.layers[layer].weighted_norm_sum[:, expert] = 0
    loaded.save(stats)
    for words, kept in (((), False), (("--protect", "super"), True)):
        out = stats.with_name(f"{kept}.json")
        assert run("plan", stats, "--out", out, *words).code == 0
        assert (expert in rd.Plan.load(out).kept[layer]) is kept


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--normalize", "max"), "--normalize max: only with --allocation global"),
        (("--normalize", "sum"), "invalid choice: 'sum'"),
        (("--allocation", "best"), "invalid choice: 'best'"),
        (("--criterion", "S(1,1,3)"), "which is not recorded; (alpha, p) can be (0, 0), (1, 0)"),
        (("--protect", "superb"), "'superb' is not super, LAYER:ID,ID such as 3:17,40, or a"),
        (("--protect", "3:"), "'3:' is not super"),
        (("--protect", "3:1,x"), "'3:1,x' is not super"),
        (("--skip-first", "0"), "'0' is not a whole number above 0"),
        (("--skip-last", "-1"), "'-1' is not a whole number above 0"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "prune"])
def test_usage(run: Run, command: str, words: tuple[str, ...], says: str) -> None:
    first = ("plan", "s") if command == "plan" else ("prune", "m", "--data", "d")
    done = run(*first, "--out", "o", *words)
    assert done.code == 2
    assert says in done.error


@pytest.mark.parametrize(
    ("content", "words", "says"),
    [
        (None, ("--layer-ratios", "{file}"), r"file.yaml cannot be read (No such file"),
        (None, ("--protect", "{file}"), r"file.yaml cannot be read (No such file"),
        ("1: [", ("--layer-ratios", "{file}"), "file.yaml is not YAML"),
        ("\x00", ("--layer-ratios", "{file}"), "file.yaml is not YAML"),
        ("[1]", ("--layer-ratios", "{file}"), "the content is [1]; expected an object; see --help"),
        ("", ("--protect", "{file}"), "the content is None; expected an object; see --help"),
        ("{}", ("--protect", "{file}"), "the content has 0 entries"),
        (
            "1: half",
            ("--layer-ratios", "{file}"),
            "field '1' is 'half'; expected a finite number",
        ),
        ("1: true", ("--layer-ratios", "{file}"), "field '1' is True; expected a finite number"),
        (
            "1: 1.0",
            ("--layer-ratios", "{file}"),
            "field '1' is 1.0; expected a finite number",
        ),
        ("1: .nan", ("--layer-ratios", "{file}"), "holds the number nan"),
        ("1: 0.5\n1: 0.2", ("--layer-ratios", "{file}"), "has the name '1' twice"),
        ("a: &a [*a]", ("--protect", "{file}"), "anchor or alias 'a'"),
        ("[" * 9999, ("--protect", "{file}"), "nested too deeply"),
        ("9: 0.5", ("--layer-ratios", "{file}"), "layer '9' is none of the 4 MoE layers"),
        (
            "1: 0.1",
            ("--layer-ratios", "{file}"),
            "ratio 0.1 of the 6 experts of layer model.layers",
        ),
        ("1: x", ("--protect", "{file}"), "field '1' is 'x'; expected a whole number"),
        ("1: -1", ("--protect", "{file}"), "field '1' is -1; expected a whole number, 0 or more"),
        ("1: [1, 2.5]", ("--protect", "{file}"), "field '1[1]' is 2.5; expected a whole number"),
        (
            "1: 6",
            ("--protect", "{file}"),
            "expert 6 cannot be protected; the layer has the ids 0..5",
        ),
        ("1: 0", ("--protect", "7:1"), "layer '7' is none of the 4 MoE layers"),
        ("1: 0", ("--protect", "*:0,1,2,3,4"), "leaves 3, but 5 of its experts are protected"),
        ("1: 0", ("--skip-first", 3, "--skip-last", 1), "leave none of the 4 MoE layers to prune"),
        ("1: 0", ("--allocation", "global", "--ratio", 0.01), "of all layers removes none"),
        ("1: 0", ("--weights", "code=1"), "weights name the groups ['code']"),
    ],
)
def test_bad_values(
    run: Run, stats: Path, content: str | None, words: tuple[Any, ...], says: str
) -> None:
    file, out = stats.with_name("file.yaml"), stats.with_name("plan.json")
    if content is not None:
        file.write_text(content)
    done = run("plan", stats, "--out", out, *(str(w).format(file=file) for w in words))
    assert done.code == 3
    assert says in done.error
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    [("--allocation", "global"), ("--skip-first", 1), ("--layer-ratios", "ratios.yaml")],
    ids=lambda words: words[0],
)
def test_what_cannot_be_written_is_refused_before_the_model_runs(
    run: Run,
    model: Path,
    data: Path,
    tmp_path: Path,
    words: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ratios.yaml").write_text("0: 0.25\n")
    out, stats = tmp_path / "out", tmp_path / "stats"
    done = run("prune", model, "--data", data, "--out", out, "--stats", stats, *words)
    assert done.code == 3
    assert "--non-uniform" in done.error
    assert "observed" not in done.out
    assert not out.exists()
    assert not stats.exists()


def test_pruning_with_protected_experts(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--protect", "super", "--protect", "0:0,1,2,3", "--criterion", "random:1")
    done = run("prune", model, "--data", data, "--out", out, *words, "--json")
    assert done.code == 0, done.err
    plan = rd.Plan.load(out / "reap/plan.json")
    first = next(iter(plan.layers.values()))
    assert first.kept == (0, 1, 2, 3)
    assert plan.criterion == "random:1"
    assert done.json["settings"] == plan.settings
    assert sum(map(len, plan.settings["protected"].values())) in (4, 5)
    assert EXPERTS < first.num_experts == 8


def test_pruning_across_layers(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    out, stats = tmp_path / "out", tmp_path / "stats"
    words = ("--allocation", "global", "--normalize", "none", "--ratio", 0.3, "--non-uniform")
    done = run("prune", model, "--data", data, "--out", out, "--stats", stats, *words, "--json")
    assert done.code == 0, done.err
    scores = rd.score(rd.SaliencyStats.load(stats))
    expected = rd.make_plan(scores, 0.3, allocation="global", normalize="none")
    assert rd.Plan.load(out / "reap/plan.json").kept == expected.kept
    assert done.json["removed"] == 4  # of 16
