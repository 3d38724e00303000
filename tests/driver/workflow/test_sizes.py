"""Sizes in place of a ratio, as a user gives them: what is foreseen is what is written."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
from reap_driver.compat.pretrained import read_model
from reap_kernels.errors import DataError, PlanError
from tests.driver.cli.conftest import (  # noqa: F401
    Run,
    data,
    grouped,
    model,
    originals,
    run,
)

RUN: dict[str, Any] = {"seq_len": 16, "device": "cpu"}
FLAGS = ("--seq-len", 16, "--device", "cpu")
CACHE = 2 * 2 * (8 + 8) * 4  # bytes of a token: layers, key-value heads, key and value, float32


def weights(folder: Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture
def stats(model: Path, data: Path) -> rd.SaliencyStats:  # noqa: F811
    observed = rd.observe_data(model, data, **RUN)
    assert isinstance(observed, rd.Observed)
    return observed.stats


@pytest.mark.parametrize(
    ("wanted", "limit"),
    [
        (("--target-size", "195kB"), 195_000),
        (("--fits", "230kB", "--context", "32"), int(0.9 * 230_000) - 32 * CACHE),
        (("--fits", "200KiB", "--context", "32"), int(0.9 * 200 * 1024) - 32 * CACHE),
        (("--target-size", "195kB", "--allocation", "global", "--non-uniform"), 195_000),
    ],
)
def test_files_are_within_the_limit_and_as_the_dry_run_said(
    wanted: tuple[str, ...],
    limit: int,
    run: Run,  # noqa: F811
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    words = ("prune", model, "--data", data, *FLAGS, *wanted)
    foreseen = run(*words, "--dry-run", "--json").json["pruned"]
    done = run(*words, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = weights(tmp_path / "out")
    assert foreseen["exact"]
    assert foreseen["weight_bytes"][0] == weights(model)
    if "global" in wanted:  # headers name other numbers of experts, by a few digits
        assert found == pytest.approx(foreseen["weight_bytes"][1], rel=0.01)
    else:
        assert found == foreseen["weight_bytes"][1]
    assert found <= limit
    plan = json.loads((tmp_path / "out" / "reap" / "plan.json").read_text())
    assert plan["ratio"] == foreseen["ratio"]
    # With an expert more in each layer, or in one of them, the files would be larger than that.
    left = [len(layer["kept"]) for layer in plan["layers"].values()]
    more = {name: 1 - (count + 1) / 8 for name, count in zip(plan["layers"], left, strict=True)}
    more_of = more if "global" not in wanted else {**more, next(iter(more)): 1 - left[0] / 8}
    larger = rd.plan(tmp_path / "out" / "reap" / "stats.safetensors", layer_ratios=more_of)
    rd.apply(model, larger, out=tmp_path / "larger", non_uniform=True)
    assert weights(tmp_path / "larger") > limit
    assert "| asked for | " in (tmp_path / "out" / "README.md").read_text()


def test_the_screen(run: Run, model: Path, data: Path) -> None:  # noqa: F811
    words = ("--fits", "230kB", "--context", 32, "--dry-run")
    done = run("prune", model, "--data", data, *FLAGS, *words)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    start = next(n for n, line in enumerate(lines) if line.startswith("experts"))
    shown = lines[start : start + 7]
    assert shown[0] == "experts     8 -> 5 experts in each of 2 layers (ratio 0.375)"
    assert shown[1:3] == [
        "parameters  60.3k -> 46.3k",
        "active      37.2k -> 37.1k used for a token",
    ]
    assert shown[3].startswith("weights     249 kB -> 191 kB in files (exact)")
    assert shown[4] == "to run it   199 kB = weights 191 kB + cache of 32 tokens 8.19 kB"
    assert shown[5] == "            of at most 207 kB, which is 90% of 230 kB"
    assert shown[6].startswith("to write it ")
    half = run("prune", model, "--data", data, *FLAGS, "--dry-run").out
    assert "8 -> 4 experts in each of 2 layers (ratio 0.5)" in half
    assert "cache of 256 tokens" in half  # the model's maximum, less than 8,192


def test_observing_alone_says_nothing_of_pruning(
    run: Run,  # noqa: F811
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    done = run("observe", model, "--data", data, *FLAGS, "--dry-run", "--json")
    assert "pruned" not in done.json
    assert run("observe", model, "--data", data, "--keep", 4, "--dry-run").code == 2
    assert rd.estimate(model, tokens=100, **RUN).leaves is None
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(f"options: {{ratio: 0.25}}\nsources: [{{source: {data}}}]\n")
    words = (model, "--recipe", recipe, *FLAGS, "--dry-run", "--json")
    assert "pruned" not in run("observe", *words).json
    assert run("prune", *words).json["pruned"]["ratio"] == 0.25
    assert run("prune", *words, "--keep", 5).json["pruned"]["ratio"] == 0.375


def test_parameters_are_those_of_the_written_model(model: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    estimated = rd.estimate(model, tokens=100, keep=5, **RUN)
    pruned = rd.prune(model, data, keep=5, out=tmp_path / "out", **RUN)
    assert isinstance(pruned, rd.Pruned)
    leaves, report = estimated.leaves, pruned.applied.report
    assert leaves is not None
    assert leaves.parameters == report.specification.parameters
    assert leaves.active_parameters == report.specification.active_parameters
    loaded = rd.load_model(tmp_path / "out")
    assert leaves.parameters[1] == sum(p.numel() for p in loaded.parameters())
    assert set(leaves.experts.values()) == {(8, 5)}
    assert pruned.planned.plan.settings == {"keep": 5}
    assert "keeps 5 of 8 experts in each of 2 layers (ratio 0.375)" in repr(pruned)


def test_the_dtype_of_observing_is_not_that_of_the_result(model: Path) -> None:  # noqa: F811
    """The checkpoint is float32, and stays it."""
    wide, narrow = (
        rd.estimate(model, tokens=100, keep=5, dtype=dtype, **RUN) for dtype in ("auto", "bfloat16")
    )
    assert wide.leaves == narrow.leaves
    assert wide.sizes.weight_bytes > narrow.sizes.weight_bytes


def test_plans_of_a_size(stats: rd.SaliencyStats, model: Path, tmp_path: Path) -> None:  # noqa: F811
    """The model is the one that the statistics name, or another folder of the same."""
    plan = rd.plan(stats, target_size="195kB").plan
    assert {len(layer.kept) for layer in plan.layers.values()} == {5}
    assert plan.settings == {"target_size": 195_000}
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    shutil.rmtree(model)
    with pytest.raises(DataError, match="is not found here; give it by `model`"):
        rd.plan(stats, target_size="195kB")
    assert rd.plan(stats, target_size="195kB", model=copy).plan.kept == plan.kept
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    assert rd.plan(stats, target_size="195kB", model=copy).plan.kept == plan.kept  # estimated


def test_the_model_of_a_size_is_that_of_the_statistics(
    stats: rd.SaliencyStats,
    grouped: Path,  # noqa: F811
) -> None:
    with pytest.raises(DataError, match=r"is not the model of the statistics: .*num_experts is 8"):
        rd.plan(stats, fits="300kB", model=grouped)


def test_a_search_of_a_size(
    stats: rd.SaliencyStats,
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    few: dict[str, Any] = {"evaluations": 4, "population": 2, "elites": 1}
    found = rd.search(model, stats, data, target_size=195_000, **few, **RUN)
    assert found.plan.settings == {"target_size": 195_000}
    assert sum(len(layer.kept) for layer in found.plan.layers.values()) == 10
    rd.apply(model, found.plan, out=tmp_path / "out", non_uniform=True)
    assert weights(tmp_path / "out") <= 195_000


@pytest.mark.parametrize("name", ["deepseek-v3.2", "gpt-oss-120b", "glm-4.5-air", "kimi-k2"])
def test_quantized_formats_and_layers_that_are_dropped(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """FP8, MXFP4, and multi-token-prediction layers: exact with the files, else near."""
    source = checkpoint(name)
    half = rd.estimate(source, tokens=64, ratio=0.5).leaves
    assert half is not None
    assert half.exact
    scores = {layer: list(map(float, range(pair[0]))) for layer, pair in half.experts.items()}
    record = rd.record_of(read_model(source)[1])
    plan = rd.make_plan(scores, 0.5, criterion="mine", of=record)
    report = rd.apply_plan(source, plan, tmp_path / "out")
    assert half.weights == (weights(source), weights(tmp_path / "out"))
    shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    index = tmp_path / "bare" / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    whole["metadata"] = {"total_size": report.source_tensor_bytes}
    index.write_text(json.dumps(whole))
    bare = rd.estimate(tmp_path / "bare", tokens=64, ratio=0.5, dtype="bfloat16")
    assert bare.stored.origin == "index"
    assert bare.leaves is not None
    assert not bare.leaves.exact
    assert bare.leaves.weights[0] == report.source_tensor_bytes
    assert bare.leaves.weights[1] == pytest.approx(report.tensor_bytes, rel=0.01)
    assert bare.leaves.parameters == half.parameters


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too few": ({"keep": 2}, PlanError, "leaves 2, but the router chooses 3 experts; give 3"),
    "all": ({"keep": 8}, PlanError, "`keep=8` of 8 experts removes none; give 7"),
    "shared": (
        {"keep": 5, "allocation": "global", "non_uniform": True},
        rd.OptionError,
        "`keep=5`: not together with `allocation='global'`",
    ),
    "skipped": ({"keep": 5, "layer_ratios": {"*": 0.25}}, PlanError, "`keep=5`: every layer has"),
    "small already": (
        {"target_size": "1GB"},
        PlanError,
        "`target_size=1GB`: nothing has to be pruned for that: the weights take 249 kB; use",
    ),
    "fits already": (
        {"fits": "1GB"},
        PlanError,
        "`fits=1GB`: nothing has to be pruned for that: the weights take 249 kB and the cache 65.5",
    ),
    "out of reach": (
        {"target_size": 100_000},
        PlanError,
        "`target_size=100kB` cannot be reached: with 3 of 8 experts in each of 2 layers, the",
    ),
    "no room for the cache": (
        {"fits": 50_000},
        PlanError,
        "the cache of 256 tokens 65,536; the smallest that can be reached is 241,",
    ),
    "long context": (
        {"fits": 300_000, "context": 512},
        DataError,
        "`context=512` is longer than the 256 positions",
    ),
    "no file": ({"layer_ratios": "none.json", "fits": 9}, DataError, "none.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_those_of_the_dry_run(
    case: str,
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    options, kind, says = REFUSED[case]
    with pytest.raises(kind) as foreseen:
        rd.estimate(model, tokens=100, **options, **RUN)
    with pytest.raises(kind) as refused:
        rd.prune(model, data, out=tmp_path / "out", **options, **RUN)
    assert str(refused.value) == str(foreseen.value)
    assert says in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", ["target_size", "fits"])
def test_the_remedy_of_a_size_out_of_reach_works(limit: str, model: Path) -> None:  # noqa: F811
    with pytest.raises(PlanError) as caught:
        rd.estimate(model, tokens=100, **{limit: 1}, **RUN)
    said = str(caught.value)
    remedy = said.split(f"give `{limit}=")[1].split("`")[0]
    least = rd.estimate(model, tokens=100, **{limit: remedy}, **RUN).leaves
    assert least is not None
    assert set(least.experts.values()) == {(8, 3)}
    exact = int(said.split("can be reached is ")[1].split(" bytes")[0].replace(",", ""))
    found = rd.estimate(model, tokens=100, **{limit: exact}, **RUN).leaves
    assert found == dataclasses.replace(least, limit=(limit, exact))
    with pytest.raises(PlanError, match="cannot be reached"):
        rd.estimate(model, tokens=100, **{limit: exact - 1}, **RUN)


def test_a_dry_run_refuses_what_the_run_refuses(
    run: Run,  # noqa: F811
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    grouped: Path,  # noqa: F811
) -> None:
    words = ("prune", model, "--data", data, *FLAGS, "--skip-first", 1)
    uneven = run(*words, "--dry-run")
    assert uneven.code == 3
    assert "Pass --non-uniform" in uneven.error
    assert (
        "experts     8 -> 4 and 8 -> 8 experts in each of 2 layers (ratio 0.5)"
        in run(*words, "--non-uniform", "--dry-run").out
    )
    groups = run("prune", grouped, "--data", data, *FLAGS, "--keep", 9, "--dry-run")
    assert groups.error.endswith(
        "--keep 9 is no multiple of the 4 routing groups of layer model.layers.1.mlp.experts; give "
        "8 or 12"
    )
