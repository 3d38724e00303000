"""Commands end to end on a tiny checkpoint: results, JSON, files, what is printed where."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reap_driver as rd
from tests.driver.cli.conftest import Run, write_model


def test_prune_is_observe_plan_apply(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    once = run(
        "prune", model, "--data", data, "--ratio", 0.5, "--seq-len", 64, "--out", tmp_path / "one"
    )
    assert once.code == 0, once.err
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    for words in (
        ("observe", model, "--data", data, "--seq-len", 64, "--out", stats),
        ("plan", stats, "--ratio", 0.5, "--out", plan),
        ("apply", model, plan, "--out", tmp_path / "two"),
    ):
        step = run(*words)
        assert step.code == 0, step.err
    files = {path.name for path in (tmp_path / "one").iterdir()} - {"README.md"}
    assert "model.safetensors" in files or "model.safetensors.index.json" in files
    for name in files - {"reap"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert rd.Plan.load(tmp_path / "one/reap/plan.json").kept == rd.Plan.load(plan).kept
    assert (tmp_path / "two/reap/plan.json").read_bytes() == plan.read_bytes()
    kept, again = (
        rd.SaliencyStats.load(path) for path in (tmp_path / "one/reap/stats.safetensors", stats)
    )
    for name, layer in kept.layers.items():
        assert torch.equal(layer.sums, again.layers[name].sums)
        assert torch.equal(layer.counts, again.layers[name].counts)


def test_the_pruned_model_loads_and_generates(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("prune", model, "--data", data, "--ratio", 0.25, "--out", out, "-q").code == 0
    pruned, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert pruned.config.num_experts == 6
    ids = AutoTokenizer.from_pretrained(out)("def", return_tensors="pt").input_ids
    assert pruned.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids.shape[1] + 3


def test_statistics_do_not_depend_on_the_batch_size(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    found = []
    for size in (1, 4):
        out = tmp_path / f"{size}.safetensors"
        words = ("--data", data, "--seq-len", 32, "--batch-size", size, "--out", out)
        assert run("observe", model, *words).code == 0
        found.append(rd.SaliencyStats.load(out))
    for name, layer in found[0].layers.items():
        other = found[1].layers[name]
        assert torch.equal(layer.counts, other.counts)
        torch.testing.assert_close(layer.sums, other.sums, rtol=1e-5, atol=0)


def test_the_batch_size_is_chosen_and_recorded(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """8 experts, 3 a token: 683 tokens give each 256 rows; a short source has fewer sequences."""
    chat = tmp_path / "b.jsonl"
    chat.write_text('{"input_ids": [10, 11, 12, 13, 14, 15, 16, 17]}\n' * 2)
    words = ("--data", data, "--data", chat, "--seq-len", 32)
    sizes = {}
    for asked in ((), ("--batch-size", "auto"), ("--batch-size", 5)):
        out = tmp_path / "-".join(map(str, ("s", *asked)))
        done = run("observe", model, *words, *asked, "--out", out, "--json").json
        sizes[asked] = [source["batch_size"] for source in done["data"]]
        assert rd.SaliencyStats.load(out).provenance["data"] == done["data"]
    tokens = done["data"][0]["tokens"]
    assert tokens > 22 * 32
    assert sizes == {(): [22, 1], ("--batch-size", "auto"): [22, 1], ("--batch-size", 5): [5, 1]}


def test_what_was_fused_is_recorded(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    found = {}
    for flags in ((), ("--fuse",), ("--no-fuse",)):
        out = tmp_path / f"stats{len(found)}.safetensors"
        words = ("observe", model, "--data", f"{data}:3", "--seq-len", 32, *flags, "--out", out)
        done = run(*words)
        assert done.code == 0, done.err
        found[flags] = rd.SaliencyStats.load(out).provenance
    fused = found["--fuse",]["fused"]
    assert (fused["norm"], fused["residual_norm"], fused["rotary"], fused["left"]) == (3, 2, 1, 0)
    assert [("fused" in facts, facts["run"].get("fuse")) for facts in found.values()] == [
        (False, None),
        (True, True),
        (False, False),
    ]
    words = ("--data", f"{data}:3", "--seq-len", 32, "--ratio", 0.5, "--fuse")
    assert run("prune", model, *words, "--out", tmp_path / "out").code == 0
    stats = rd.SaliencyStats.load(tmp_path / "out/reap/stats.safetensors")
    assert stats.provenance["fused"] == fused


def test_groups_are_kept_apart_and_weighed(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    chat = tmp_path / "b.jsonl"
    chat.write_text('{"input_ids": [10, 11, 12, 13, 14, 15, 16, 17]}\n' * 9)
    stats, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    seen = run("observe", model, "--data", f"{data}:7", "--data", f"talk={chat}", "--out", stats)
    assert seen.code == 0, seen.err
    loaded = rd.SaliencyStats.load(stats)
    assert loaded.groups == ["code", "talk"]
    sources = loaded.provenance["data"]
    assert [(s["group"], s["records"]) for s in sources] == [("code", 7), ("talk", 9)]
    assert sources[1]["tokens"] == 9 * 8
    for layer in loaded.layers.values():
        assert layer.tokens.tolist() == [source["tokens"] for source in sources]
        assert layer.count.sum(dim=1).tolist() == [3 * source["tokens"] for source in sources]
    words = ("--weights", "code=1,talk=3", "--criterion", "msan", "--out", plan)
    assert run("plan", stats, *words).code == 0
    written = rd.Plan.load(plan)
    assert (written.weights, written.criterion) == ({"code": 1.0, "talk": 3.0}, "msan")
    expected = rd.make_plan(rd.score(loaded, "msan", {"code": 1, "talk": 3}), 0.5)
    assert written.kept == expected.kept
    assert written.data == sources


def test_grouped_routers_keep_equal_counts(
    run: Run, grouped: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run("prune", grouped, "--data", data, "--ratio", 0.4, "--out", out)
    assert done.code == 0, done.err
    assert "removes 4 instead of 6 of 16 experts a layer" in done.err
    for layer in rd.Plan.load(out / "reap/plan.json").layers.values():
        assert [sum(e // 4 == group for e in layer.kept) for group in range(4)] == [3] * 4


def test_a_number_of_experts_that_an_engine_refuses_is_noted_once(
    run: Run, data: Path, tmp_path: Path
) -> None:
    """Before the run, and not again when the checkpoint is written; other models serve any."""
    for name, times in {"deepseek_v4": 1, "qwen3_moe": 0}.items():
        model = write_model(tmp_path / name, name)
        done = run(
            "prune", model, "--data", data, "--ratio", 0.4, "--out", tmp_path / f"{name}-cut"
        )
        assert done.code == 0, done.err
        assert done.err.count("experts in a layer, a number that vLLM's router for") == times


def test_json_is_one_object_and_all_of_stdout(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run("prune", model, "--data", data, "--ratio", 0.5, "--out", out, "--json").json
    assert (done["command"], done["out"], done["criterion"]) == ("prune", str(out), "reap")
    assert (done["experts_before"], done["experts_after"], done["layers"]) == (8, 4, 2)
    assert done["tokens"] == sum(source["tokens"] for source in done["data"]) > 0
    assert done["tensor_bytes_after"] < done["tensor_bytes_before"]
    assert [8, 4] in done["edited_config"].values()


def test_quiet_says_nothing(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    stats = tmp_path / "s.safetensors"
    for words in (
        ("observe", model, "--data", f"{data}:1000", "--out", stats),
        ("plan", stats, "--out", tmp_path / "p.json"),
    ):
        done = run(*words, "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")


def test_stats_of_a_pruning_can_be_kept_elsewhere(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    stats, out = tmp_path / "s.safetensors", tmp_path / "out"
    assert run("prune", model, "--data", data, "--stats", stats, "--out", out).code == 0
    inside = rd.SaliencyStats.load(out / "reap/stats.safetensors")
    assert rd.SaliencyStats.load(stats).provenance == inside.provenance


def test_overwrite_replaces(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("prune", model, "--data", data, "--out", out, "--ratio")
    assert run(*words, 0.5).code == 0
    refused = run(*words, 0.25)
    assert refused.code == 3
    assert "exists" in refused.error
    assert "--overwrite" in refused.error
    assert len(rd.Plan.load(out / "reap/plan.json").layers.popitem()[1].kept) == 4
    assert run(*words, 0.25, "--overwrite").code == 0
    assert len(rd.Plan.load(out / "reap/plan.json").layers.popitem()[1].kept) == 6


def test_sequences_are_as_long_as_the_model_reads(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "s.safetensors"
    assert run("observe", model, "--data", data, "--out", stats).code == 0
    assert rd.SaliencyStats.load(stats).provenance["data"][0]["seq_len"] == 256  # not 2048
    long = run("observe", model, "--data", data, "--seq-len", 257, "--out", tmp_path / "t")
    assert long.code == 3
    assert "--seq-len 257 is longer than the 256 positions" in long.error


def test_shards_of_a_size(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--data", data, "--shard-size", "20kB", "--out", out)
    assert run("prune", model, *words).code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2


@pytest.mark.parametrize("as_json", [False, True])
def test_doctor(run: Run, as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # As for users: Triton does not serve the CPU then, and no kernel of it is checked.
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = run("doctor", *(["--json"] if as_json else []))
    assert done.code == 0
    if as_json:
        assert done.json["packages"]["torch"] == torch.__version__
        assert {line["op"] for line in done.json["backends"]} >= {"layer", "saliency"}
    else:
        assert f"torch         {torch.__version__}" in done.out
        # The emulation of `wgmma` serves 16 bits; users' CPUs have none.
        assert "  layer       cpu; else reference, wgmma (bfloat16, float16)\n" in done.out
        assert "  layer       cpu; else reference (float32)\n" in done.out
        assert " ".join(done.out.split()).count("on the CPU, where Triton runs only") == 1
        lines = [line for line in done.out.splitlines() if "/" not in line]  # paths stay whole
        assert max(map(len, lines)) <= 80


def test_doctor_shows_lines_of_launch_tables_that_are_off(run: Run, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("reap_kernels.doctor._launch_tables", lambda: {"sm90": ["by hand"]})
    said = run("doctor").out.partition("launches on sm90: by hand\n")[2].splitlines()
    assert said[0] == "  off, has not run on a GPU:"
    assert "    gate_up half: 128,128,64,8,8,3,tma" in said
    assert "    norm half: triton" in said


def test_demo_calls_the_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo itself is tested where it is written; here, that it is called as asked."""
    asked = []

    def run_demo(out: Path, *, seed: int, quiet: bool) -> dict[str, int]:
        asked.append((out, seed, quiet))
        return {"figure": 1}

    monkeypatch.setattr("reap_driver.demo.run.run_demo", run_demo)
    assert run("demo", "--out", tmp_path, "--seed", 3).out == ""
    assert run("demo", "--out", tmp_path, "--json").json == {"command": "demo", "figure": 1}
    assert asked == [(tmp_path, 3, False), (tmp_path, 0, True)]


def test_version(run: Run) -> None:
    assert run("--version").out == f"reap-kernels {rd.__version__}\n"
