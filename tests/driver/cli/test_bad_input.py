"""Bad input: one clear line naming input, value, remedy; the exit code; nothing half-done."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3MoeForCausalLM

from reap_driver.data.prefetch import THREAD
from tests.driver.cli.conftest import Run, write_model

Spoil = Callable[[Path], None]


def edit_config(**fields: Any) -> Spoil:
    def spoil(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return spoil


def dense(model: Path) -> None:
    shutil.rmtree(model)
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"], hidden_size=32, num_hidden_layers=2, vocab_size=259
    ).save_pretrained(model)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def shard(model: Path) -> Path:
    """A shard with experts."""
    weight_map = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    return model / next(file for key, file in weight_map.items() if "down_proj" in key)


def missing_shard(model: Path) -> None:
    shard(model).unlink()


def truncated(model: Path) -> None:
    path = shard(model)
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(model: Path) -> None:
    path = shard(model)
    path.write_bytes(path.read_bytes()[:20])


def index_leaves(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = "../x.safetensors"
    path.write_text(json.dumps(index))


def nan_weights(model: Path) -> None:
    path = shard(model)
    tensors = load_file(path)
    for key in tensors:
        if "down_proj" in key:
            tensors[key].view(-1)[0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


MODELS: dict[str, tuple[Spoil, str]] = {
    "not a MoE": (
        dense,
        r"model: Qwen3ForCausalLM has no mixture-of-experts layer; only models with",
    ),
    "dense layers only": (
        edit_config(mlp_only_layers=[0, 1]),
        r"model: Qwen3MoeForCausalLM has no mixture-of-experts layer",
    ),
    "unknown architecture": (
        edit_config(model_type="martian", architectures=["MartianForCausalLM"]),
        r"model: model_type 'martian' with architecture 'MartianForCausalLM' is unknown.*use a",
    ),
    "no config": (no_config, r"model: no config.json there; give the folder of"),
    "broken config": (broken_config, r"config.json: is not JSON .*; restore the file"),
    "missing shard": (missing_shard, r"model-0.*safetensors.*missing"),
    "truncated safetensors": (truncated, r"model-0.*safetensors.*(truncated|ends).*"),
    "truncated header": (cut_in_the_header, r"model-0.*safetensors.*(truncated|ends).*"),
    "shape not matching config": (
        edit_config(moe_intermediate_size=16),
        r"config.json.*(shape|config)",
    ),
    "index leaving the folder": (index_leaves, r"index.json.*'../x.safetensors'"),
    "NaN weights": (
        nan_weights,
        r"model.layers.0.mlp.experts.*NaN or Inf.*check the checkpoint's weights",
    ),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", ["prune", "observe"])
def test_models(run: Run, model: Path, data: Path, case: str, command: str) -> None:
    spoil, says = MODELS[case]
    spoil(model)
    before = listing(model.parent)
    done = run(command, model, "--data", data, "--out", model.parent / "out")
    assert done.code == 3
    assert re.search(says, done.error), done.error
    assert listing(model.parent) == before


RATIOS = {
    "0": r"--ratio 0: give a number above 0 and below 1",
    "1": r"--ratio 1: give",
    "1.5": r"--ratio 1.5: give",
    "-0.5": r"--ratio -0.5: give",
    "nan": r"--ratio nan: give",
    "0.75": r"ratio 0.75 of the 8 experts of layer model.layers.0.mlp.experts leaves 2, but the "
    r"router chooses 3 experts; use a ratio from 0.125 to 0.625",
    "0.1": r"ratio 0.1 of the 8 experts .* removes none .*from 0.125",
}


@pytest.mark.parametrize("ratio", RATIOS)
def test_ratios(run: Run, model: Path, data: Path, tmp_path: Path, ratio: str) -> None:
    """Refused before the weights are read: they are not even there."""
    before = listing(tmp_path)
    done = run("prune", model, "--data", data, "--ratio", ratio, "--out", tmp_path / "out")
    assert done.code == (3 if "experts" in RATIOS[ratio] else 2)
    assert re.search(RATIOS[ratio], done.error), done.error
    assert listing(tmp_path) == before


def test_ratio_that_leaves_a_group_too_few(
    run: Run, grouped: Path, data: Path, tmp_path: Path
) -> None:
    before = listing(tmp_path)
    done = run("prune", grouped, "--data", data, "--ratio", 0.75, "--out", tmp_path / "out")
    assert done.code == 3
    says = "leaves 4, but the router chooses 3 experts from 2 of 4 groups; use a ratio from 0.25 to"
    assert says in done.error
    assert listing(tmp_path) == before


DATA = {
    "empty": ("", r"code.jsonl holds no records; give data"),
    "malformed": ('{"text": "a"}\n{"text"', r"code.jsonl:2: is not JSON .*; correct the line"),
    "no known field": (
        '{"text": "a"}\n{"body": "b"}\n',
        r"code.jsonl:2: has the fields of no known format, .*messages.* \(it has body\); rename",
    ),
    "token id": (
        '{"input_ids": [1, 2]}\n\n{"input_ids": [3, 300]}\n',
        r"code.jsonl:3: token id 300 is outside the vocabulary of .*model \(259 tokens\); tokenize",
    ),
    "no chat template": (
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        r"code.jsonl:1: is a conversation, .*no chat template; give one with --chat-template",
    ),
    "no token": ('{"text": ""}\n', r"code.jsonl: its 1 records hold no token; give some text"),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("command", ["prune", "observe"])
def test_data(run: Run, model: Path, data: Path, case: str, command: str) -> None:
    content, says = DATA[case]
    data.write_text(content)
    before = listing(model.parent)
    done = run(command, model, "--data", data, "--out", model.parent / "out")
    assert done.code == 3
    assert re.search(says, done.error), done.error
    assert listing(model.parent) == before


@pytest.mark.parametrize("which", ["model", "data"])
def test_paths_that_do_not_exist(
    run: Run, model: Path, data: Path, tmp_path: Path, which: str
) -> None:
    places = {"model": model, "data": data, which: tmp_path / "nowhere"}
    done = run("prune", places["model"], "--data", places["data"], "--out", tmp_path / "out")
    assert done.code == 3
    assert f"{tmp_path}/nowhere" in done.error


def test_plan_of_another_model(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", "qwen3_moe", moe_intermediate_size=20)
    stats, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    assert run("observe", other, "--data", data, "--out", stats).code == 0
    assert run("plan", stats, "--out", plan).code == 0
    before = listing(tmp_path)
    done = run("apply", model, plan, "--out", tmp_path / "out")
    assert done.code == 3
    assert re.search(r"plan.* made for '.*other'.*make the plan from statistics", done.error)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("plan", "{data}", "--out", "{out}"), r"code.jsonl cannot be read"),
        (("plan", "{tmp}/none", "--out", "{out}"), r"statistics file .*none cannot be read"),
        (("apply", "{model}", "{data}", "--out", "{out}"), r"plan .*code.jsonl is not"),
        (("apply", "{model}", "{tmp}/none", "--out", "{out}"), r"plan .*none cannot be read"),
        (("observe", "{model}", "--data", "{data}", "--out", "{data}"), r"code.jsonl: exists;"),
        (("observe", "{model}", "--data", "{data}", "--out", "{model}"), r"model: is a folder;"),
        (
            ("observe", "{model}", "--data", "{data}", "--out", "{tmp}/a/b"),
            r"the folder .*/a does not exist; make it first",
        ),
        (("prune", "{model}", "--data", "{data}", "--out", "{model}"), r"is the source"),
        (
            ("prune", "{model}", "--data", "{data}", "--weights", "a=1", "--out", "{out}"),
            r"weights name the groups \['a'\], but .*\['code'\]",
        ),
        (
            ("prune", "{model}", "--data", "{data}", "--device", "cuda:99", "--out", "{out}"),
            r"--device cuda:99: not there",
        ),
        (
            ("prune", "{model}", "--data", "{data}", "--device", "toaster", "--out", "{out}"),
            r"--device toaster: not there",
        ),
    ],
)
def test_arguments(
    run: Run, model: Path, data: Path, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    before = listing(tmp_path)
    places = {"model": model, "data": data, "tmp": tmp_path, "out": tmp_path / "out"}
    done = run(*(word.format(**places) for word in words))
    assert done.code == 3
    assert re.search(says, done.error), done.error
    assert listing(tmp_path) == before


def test_a_backend_that_is_not_there_is_a_matter_of_resources(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    words = ("--data", data, "--backend", "abacus", "--out", tmp_path / "out")
    done = run("prune", model, *words)
    assert done.code == 4
    assert "backend 'abacus' does not exist" in done.error
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_a_matter_of_resources(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = tmp_path / "s.safetensors"
    assert run("observe", model, "--data", data, "--out", stats).code == 0

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = listing(tmp_path)
    done = run("plan", stats, "--out", tmp_path / "p.json")
    assert done.code == 4
    assert "No space left on device; free some space" in done.error
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_a_matter_of_resources(
    run: Run,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    before = listing(tmp_path)
    raise_from_observing(monkeypatch, error)
    done = run("prune", model, "--data", data, "--out", tmp_path / "out")
    assert done.code == 4
    assert f"out of memory ({str(error) or 'MemoryError'})" in done.error
    assert "use a smaller --seq-len or --batch-size" in done.error
    assert listing(tmp_path) == before


def test_ctrl_c_is_130_and_a_bug_keeps_its_traceback(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("prune", model, "--data", data, "--out", tmp_path / "out")
    raise_from_observing(monkeypatch, KeyboardInterrupt())
    done = run(*words, "--json")
    assert done.code == done.json["error"]["exit_code"] == 130
    assert not [t for t in threading.enumerate() if t.name.startswith(THREAD)]
    raise_from_observing(monkeypatch, AssertionError("a bug"))
    with pytest.raises(AssertionError, match="a bug"):
        run(*words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "a COMMAND is missing"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        (("prune", "m", "--out", "o"), "no data to run the model on; give --data or --recipe"),
        (("prune", "m", "--data", "d"), "required: --out"),
        (("plan", "s", "--out", "o", "--ratio", "half"), "'half' is no share"),
        (("plan", "s", "--out", "o", "--ratio", "50%"), "'50%' is no share; write 50% as 0.5"),
        (
            ("plan", "s", "--out", "o", "--criterion", "taylor"),
            "'taylor' is unknown; choose one of",
        ),
        (("plan", "s", "--out", "o", "--weights", "code"), "'code' is not GROUP=NUMBER"),
        (
            ("apply", "m", "p", "--out", "o", "--shard-size", "big"),
            "--shard-size big: not a size such as 5GB",
        ),
        (("plan", "s", "--out", "o", "--keep", "few"), "'few' is not a whole number above 0"),
        (("plan", "s", "--out", "o", "--keep", "4", "--fits", "9GB"), "not allowed with argument"),
        (("plan", "s", "--out", "o", "--fits", "16XB"), "--fits 16XB: not a size such as 5GB"),
        (("plan", "s", "--out", "o", "--fits", "16"), "--fits 16: not a size such as 5GB"),
        (("plan", "s", "--out", "o", "--target-size", "0"), "--target-size 0: not a size such as"),
        (("plan", "s", "--out", "o", "--fits", "9GB", "--context", "0"), "'0' is not a whole"),
        (("plan", "s", "--out", "o", "--context", "9"), "--context 9: only with --fits, or with"),
        (
            ("plan", "s", "--out", "o", "--model", "m"),
            "--model m: only with --target-size, --fits or",
        ),
        (("observe", "m", "--data", "d", "--out", "o", "--keep", "4"), "unrecognized arguments"),
        (("observe", "m", "--data", "d", "--out", "o", "--seq-len", "0"), "'0' is not a whole"),
        (
            ("observe", "m", "--data", "d", "--out", "o", "--batch-size", "-1"),
            "'-1' is not a whole number above 0, nor auto",
        ),
    ],
)
def test_usage(run: Run, words: tuple[str, ...], says: str) -> None:
    done = run(*words)
    assert done.code == 2
    assert says in done.error
    assert done.err.startswith("usage: reap-kernels")
    assert done.out == ""


def test_errors_as_json(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    words = ("prune", model, "--data", data, "--ratio", 0.75, "--out", tmp_path / "out", "--json")
    done = run(*words)
    assert done.code == 3
    error = done.json["error"]
    assert (error["type"], error["exit_code"]) == ("PlanError", 3)
    assert done.error == f"reap-kernels: error: {error['message']}"
    assert run("prune", "--json").json["error"]["exit_code"] == 2


def raise_from_observing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes every forward of the tiny model end with an error."""

    def forward(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Qwen3MoeForCausalLM, "forward", forward)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file under a folder with its size and time of change: what a run may not alter."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
