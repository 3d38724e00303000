"""`compare` gives the same for a checkpoint and its plan, resident and streamed."""

import importlib.util
import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reap_driver as rd
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.data.batches import PackedBatches
from reap_driver.data.encode import Encoder
from reap_driver.data.packing import pack
from reap_driver.data.source import DataSource
from reap_driver.evaluation import models, tasks
from reap_driver.workflow.errors import OptionError
from reap_kernels.errors import DataError
from tests.driver import zoo
from tests.driver.cli.conftest import VOCAB, Run, write_model
from tests.driver.streaming.packing import CASES
from tests.driver.writer import saved

FIGURES = (
    "original_perplexity",
    "pruned_perplexity",
    "perplexity_ratio",
    "kl",
    "acceptance",
    "same_top",
)


@pytest.fixture
def pruned(run: Run, originals: dict[str, Path], data: Path, tmp_path: Path) -> Path:
    """Half of the plain checkpoint, with its plan and statistics."""
    out = tmp_path / "half"
    done = run("prune", originals["plain"], "--data", data, "--ratio", 0.5, "--out", out)
    assert done.code == 0
    return out


@pytest.fixture
def words(originals: dict[str, Path], pruned: Path, data: Path) -> list[object]:
    """A command line that succeeds."""
    return ["compare", originals["plain"], pruned, "--data", data, "--seq-len", 32]


def values(found: dict) -> dict[str, float]:
    return {name: found["overall"][name]["value"] for name in FIGURES}


def test_weights_quantized_after_pruning_are_not_audited(
    run: Run, words: list[object], pruned: Path
) -> None:
    """Their numbers are others than the original's, which says nothing about the experts' order."""
    settings = CASES["int8"][0]
    files = [load_file(path) for path in sorted(pruned.glob("*.safetensors"))]
    whole = {key: tensor for file in files for key, tensor in file.items()}
    parts = {}
    for key, tensor in whole.items():
        if ".experts." not in key or tensor.ndim != 2:
            parts[key] = tensor.bfloat16()
            continue
        scale = (tensor.float().abs().amax(dim=1, keepdim=True) / 127).bfloat16()
        parts[key] = (tensor.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
        parts[f"{key}_scale"] = scale
    assert len(parts) > len(whole)
    quantized = pruned.with_name("quantized")
    shutil.copytree(pruned, quantized, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(parts, quantized / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(pruned / "reap", quantized / "reap", dirs_exist_ok=True)
    saved.change_config(quantized, dtype="bfloat16", quantization_config=settings)
    words[2] = quantized
    done = run(*words, "--json")
    assert "was quantized after it was pruned" in done.err
    assert "misplaced" not in done.json["integrity"]
    assert (
        0 < done.json["integrity"]["calibration_gate_share"] < 1
    )  # which the plan and statistics tell
    assert done.json["overall"]["acceptance"]["value"] > 0.5
    words[1] = pruned  # the plan is of its original, not of it
    done = run(*words, "--json")
    assert done.code == 0
    assert not done.json.get("integrity")
    assert done.json["overall"]["acceptance"]["value"] > 0.9


def test_checkpoint_plan_and_streams_agree(
    run: Run, words: list[object], pruned: Path, data: Path
) -> None:
    """The pruned checkpoint predicts as the original with masked routers, streamed or not."""
    found = run(*words, "--json").json
    assert found["overall"]["predictions"] > 500
    assert 0.5 < found["overall"]["acceptance"]["value"] < 1
    streamed = run(*words, "--json", "--stream", "always")
    assert streamed.json["overall"] == found["overall"]
    assert "orphans are not counted of streamed models" in streamed.err
    words[2] = pruned / "reap" / "plan.json"
    masked = run(*words, "--json").json
    assert values(masked) == pytest.approx(values(found), rel=1e-4, abs=1e-5)
    assert found["data"][0]["source"] == str(data)


def test_figures_are_those_of_python(
    run: Run, words: list[object], originals: dict[str, Path], pruned: Path
) -> None:
    """With documents packed, and one at a time: the sums differ, and each equals the API's."""
    for packing in (["--packing", "isolated"], ["--packing", "none", "--max-len", 32]):
        line = [*words[:5], *packing] + (["--seq-len", 32] if packing[1] == "isolated" else [])
        found = run(*line, "--json", "--batch-size", 3).json
        batches = batches_of(originals["plain"], words[4], packing[1])
        models = [rd.load_model(path) for path in (originals["plain"], pruned)]
        want = rd.compare_models(*models, batches).overall
        assert found["overall"]["predictions"] == want.predictions
        for name in FIGURES:
            estimate = getattr(want, name)
            assert found["overall"][name]["value"] == pytest.approx(
                estimate.value, rel=1e-4, abs=1e-6
            )


def batches_of(model: Path, data: object, packing: str) -> list[dict]:
    """Batches of one sequence."""
    encoder = Encoder(str(model), load_config(model))
    source = pack(DataSource.parse(str(data)), encoder, seq_len=32, packing=packing)
    batches = PackedBatches([source], [1], pad=False)
    return [batches.inputs(number) for number in range(len(batches))]


def test_groups_limits_and_words(run: Run, words: list[object], data: Path) -> None:
    other = data.with_name("chat.jsonl")
    shutil.copy(data, other)
    words += ["--data", f"{other}:96tok"]
    said = run(*words, "--sequences", 5)
    assert said.code == 0
    for part in ("code: 155 predictions in 5 sequences", "chat: 93 predictions in 3 sequences"):
        assert part in said.out
    assert "all: 248 predictions in 8 sequences" in said.out
    assert said.out.count("expected acceptance") == 3
    assert "all in the plan's order" in said.out
    found = run(*words, "--tokens", 64, "--json").json
    assert found["groups"]["code"]["predictions"] == 62
    apart = [*words[:5], "--packing", "none", "--sequences", 4]
    assert run(*apart, "--json").json["data"][0]["records"] == 4
    one = run(*words[:-2], "--sequences", 1)
    assert "no interval: a group has one sequence" in one.out
    whole = run(*words[:-2], "--sequences", 1, "--json").json["overall"]
    assert (whole["kl"]["low"], whole["kl"]["high"]) == (None, None)


def test_several(
    run: Run, words: list[object], pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of the original for all, the figures of one comparison each, differences besides."""
    half, few = pruned / "reap" / "plan.json", tmp_path / "few.json"
    assert run("plan", pruned / "reap/stats.safetensors", "--ratio", 0.25, "--out", few).code == 0
    given = (half, few, pruned)
    alone = [run(*words[:2], one, *words[3:], "--json").json for one in given]
    several = [*words[:2], *given, *words[3:]]
    ran, predict = [], models.predict
    monkeypatch.setattr(models, "predict", lambda m, batch: ran.append(id(m)) or predict(m, batch))
    found = run(*several, "--batch-size", 30, "--json")
    assert found.code == 0, found.err
    batches = len(ran) // 4
    assert ran == [ran[0], ran[0], ran[0], ran[3]] * batches, "original, two plans, a checkpoint"
    one = run(*several, "--json").json
    assert [c["pruned"] for c in one["comparisons"]] == [str(path) for path in given]
    for mine, want in zip(one["comparisons"], alone, strict=True):
        assert mine["overall"] == want["overall"]
        for key in ("orphan_rate", "orphans_by_layer", "retained_gate_share"):
            assert mine["integrity"][key] == want["integrity"][key]
    less = one["differences"][0]
    assert (less["pruned"], less["less"]) == (str(few), str(half))
    for key in ("kl", "acceptance", "same_top"):
        parts = [figures["overall"][key] for figures in alone[:2]]
        assert less[key]["value"] == pytest.approx(parts[1]["value"] - parts[0]["value"])
        spread = sum(part["high"] - part["low"] for part in parts)
        assert 0 < less[key]["high"] - less[key]["low"] < spread
    said = run(*several).out
    assert max(map(len, said.splitlines())) <= 80
    assert said.count("the original") == 1
    assert f"...{str(few)[-18:]}" in said
    twice = run(*words[:2], half, few, half, *words[3:])
    assert (twice.code, f"{half} is given twice" in twice.error) == (2, True)


def test_several_streamed(
    run: Run, words: list[object], pruned: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "few"
    assert run("prune", words[1], "--data", data, "--ratio", 0.25, "--out", other).code == 0
    several = [*words[:2], pruned, other, *words[3:], "--json"]
    streamed, resident = run(*several, "--stream", "always").json, run(*several).json
    for key in ("comparisons", "differences"):
        for mine, want in zip(streamed[key], resident[key], strict=True):
            assert mine["pruned"] == want["pruned"]
            assert mine.get("overall", mine) == want.get("overall", want)


def test_several_by_python(originals: dict[str, Path], pruned: Path, data: Path) -> None:
    """Plans that are no files have numbers, or a dictionary's names; a list of one gives a list."""
    plan = rd.Plan.load(pruned / "reap" / "plan.json")
    found = rd.compare(originals["plain"], [plan, pruned], data, seq_len=32)
    assert isinstance(found, rd.Comparisons)
    assert [one.pruned for one in found.compared] == ["plan 1, reap", str(pruned)]
    assert "plan 1, reap" in found.describe()
    assert "plan 1, reap" in found._repr_html_()
    named = rd.compare(originals["plain"], {"mine": plan, "theirs": pruned}, data, seq_len=32)
    assert [one.pruned for one in named.compared] == ["mine", "theirs"]
    assert named.differences == found.differences
    with pytest.raises(OptionError, match=r"`pruned` has a list; give .* \{name: plan\}"):
        rd.compare(originals["plain"], {"mine": [plan]}, data, seq_len=32)
    assert isinstance(rd.compare(originals["plain"], [plan], data, seq_len=32), rd.Comparisons)
    one = rd.compare(originals["plain"], plan, data, seq_len=32)
    assert isinstance(one, rd.Compared)
    assert found.compared[0].comparison.overall == one.comparison.overall
    shorter = rd.compare(originals["plain"], plan, data, seq_len=16).comparison
    with pytest.raises(DataError, match="which are not the same; compare both models on the same"):
        shorter.less(one.comparison)


def test_integrity(run: Run, words: list[object], pruned: Path, originals: dict[str, Path]) -> None:
    """Orphans and retained routing equal those of `orphans`; a damaged checkpoint is reported."""
    found = run(*words, "--json").json["integrity"]
    assert 0 < found["orphan_rate"] < 0.5
    assert 0.5 < found["retained_gate_share"] < 1
    assert set(found["orphans_by_layer"]) == set(rd.Plan.load(pruned / "reap/plan.json").layers)
    assert found["misplaced"] == []
    assert found["dead_kept"] + found["dead_removed"] == 0
    assert 0.5 < found["calibration_gate_share"] < 1
    name = "model.layers.1.mlp.gate.weight"
    [shard] = [path for path in pruned.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(shard)
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, shard, {"format": "pt"})
    said = run(*words)
    assert f"4 PROBLEMS, first: {name}: expert 0" in " ".join(said.out.split())
    assert "(2 decoder layers checked)" in said.out


def test_layers_of_different_sizes(run: Run, words: list[object], tmp_path: Path) -> None:
    model = Path(str(words[1]))
    plan = saved.make_plan(model, meta_model(load_config(model)), saved.differing())
    replace(plan, allocation="global").save(tmp_path / "uneven.json")
    out = tmp_path / "uneven"
    assert run("apply", model, tmp_path / "uneven.json", "--out", out, "--non-uniform").code == 0
    words[2] = out
    found = run(*words, "--json")
    assert found.code == 0
    words[2] = tmp_path / "uneven.json"
    masked = run(*words, "--json")
    assert values(masked.json) == pytest.approx(values(found.json), rel=1e-4, abs=1e-5)


def test_refusals(run: Run, words: list[object], tmp_path: Path, grouped: Path) -> None:
    def error(*more: object, pruned: object = words[2], code: int = 3) -> str:
        done = run(*words[:2], pruned, *words[3:], *more)
        assert done.code == code
        return done.error

    assert "no such checkpoint folder" in error(pruned=tmp_path / "none")
    other = write_model(tmp_path / "other", "qwen3_moe")
    config = json.loads((other / "tokenizer.json").read_text())
    vocabulary = config["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(config))
    assert "the tokenizers of" in (text := error(pruned=other))
    assert f"first in token 20, {first!r}" in text or f"{second!r}" in text
    small = tmp_path / "small"
    zoo.tiny("qwen3_moe", vocab_size=VOCAB - 1)[1].save_pretrained(str(small))
    assert f"has {VOCAB} tokens, but {small} has {VOCAB - 1}" in error(pruned=small)
    plan = Path(str(words[2])) / "reap" / "plan.json"
    text = error("--stream", "always", pruned=plan, code=4)
    assert "reap-kernels apply" in text
    done = run("compare", grouped, plan, *words[3:])
    assert done.code == 3
    assert "plan" in done.error
    assert run(*words[:3]).code == 2
    assert "--data, --recipe or --tasks" in run(*words[:3]).err
    assert "'warp' does not exist" in error("--backend", "warp", code=4)


def test_tokenizer_may_be_missing(run: Run, words: list[object], pruned: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pruned / name).unlink()
    assert run(*words).code == 0


# --- tasks


def test_the_harness_is_asked_for(run: Run, words: list[object], monkeypatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    done = run(*words[:3], "--tasks", "gsm8k")
    assert done.code == 3
    assert "pip install reap-kernels[eval]" in done.error


class Harness:
    """A stand-in with the three names of lm-evaluation-harness 0.4 that are used."""

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def simple_evaluate(self, **asked: object) -> dict:
        self.asked.append(asked)
        model = asked["model"].pretrained
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        value = float(logits.double().sum())
        results = {"alias": "x", "acc,none": value, "acc_stderr,none": 0.5, "n,none": "N/A"}
        return {"results": dict.fromkeys(asked["tasks"], results)}

    def install(self, monkeypatch) -> None:
        names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
        modules = {name: types.ModuleType(name) for name in names}
        modules["lm_eval"].simple_evaluate = self.simple_evaluate
        modules["lm_eval.models.huggingface"].HFLM = types.SimpleNamespace
        modules["lm_eval.tasks"].TaskManager = Tasks
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: True)


class Tasks:
    def __init__(self, include_path: str | None) -> None:
        self.include_path = include_path

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in ("one", "two")]


def test_tasks_are_asked_of_both_models(
    run: Run, words: list[object], pruned: Path, monkeypatch
) -> None:
    """For a plan, the original with masked routers answers; all settings are passed on."""
    harness = Harness()
    harness.install(monkeypatch)
    (pruned / "given.jinja").write_text("{{ messages }}")
    more = ["--tasks", "one,two", "--limit", 7, "--batch-size", 2, "--apply-chat-template"]
    more += ["--chat-template", pruned / "given.jinja", "--json"]
    outcomes = []
    for second in (pruned, pruned / "reap" / "plan.json"):
        done = run("compare", words[1], second, *more)
        assert done.code == 0
        outcomes.append(done.json["tasks"])
        assert "overall" not in done.json
    assert outcomes[0]["original"] == outcomes[1]["original"]
    values = [outcome["pruned"]["one"]["acc,none"] for outcome in outcomes]
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-4)
    assert values[0][0] != pytest.approx(outcomes[0]["original"]["one"]["acc,none"][0], rel=1e-4)
    assert values[0][1] == 0.5
    asked = harness.asked[0]
    assert (asked["tasks"], asked["limit"], asked["model"].batch_size) == (["one", "two"], 7, 2)
    assert asked["apply_chat_template"] is True
    assert asked["model"].tokenizer.chat_template == "{{ messages }}"
    both = run("compare", words[1], pruned, pruned / "reap" / "plan.json", *more).json
    answers = [one["tasks"]["pruned"] for one in both["comparisons"]]
    assert answers == [outcome["pruned"] for outcome in outcomes]
    assert both["differences"] == []
    said = run("compare", words[1], pruned, *more[:-1])
    assert "the original" in said.out
    assert said.out.count("acc") == 2
    done = run("compare", words[1], pruned, "--tasks", "three")
    assert (done.code, "has no task 'three'" in done.error) == (3, True)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_real_harness(run: Run, words: list[object], tmp_path: Path) -> None:
    lines = [
        json.dumps({"question": f"def f{i}(a):", "choices": [" return a", " x"], "answer": i % 2})
        for i in range(4)
    ]
    (tmp_path / "tiny.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(
        "task: reap_tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'tiny.jsonl'}\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc\n'
    )
    done = run(*words[:3], "--tasks", "reap_tiny", "--task-folder", tmp_path / "tasks", "--json")
    answers = done.json["tasks"]["original"]["reap_tiny"]["acc,none"]
    assert answers[0] * 4 in (0, 1, 2, 3, 4)
