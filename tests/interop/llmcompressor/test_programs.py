"""The programs of the guide run, and what they write loads again and predicts."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import reap_driver as rd
from reap_driver.interchange import llm_compressor_report
from reap_driver.interchange.content import ModelFacts
from tests.interop import after_pruning
from tests.interop.llmcompressor.runs import ROOT

PROGRAMS = ROOT / "examples" / "llm_compressor"
SEQ_LEN, TOKENS = after_pruning.SEQ_LEN, after_pruning.TOKENS


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The padded bundled model, its text, and what llm-compressor's REAP alone makes of it."""
    folder = tmp_path_factory.mktemp("given")
    model = after_pruning.padded(folder / "model")
    found = {"model": model, **after_pruning.texts(folder), "pruned": folder / "pruned"}
    run_program("reap.py", found, found["pruned"])
    return found


def run_program(name: str, given: dict[str, Path], out: Path, *words: str) -> None:
    """Runs a program from its command line."""
    data = f"{given['calibration']}:{TOKENS}"
    line = [name, str(given["model"]), str(out), "--data", data, "--seq-len", str(SEQ_LEN), *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line)
        runpy.run_path(str(PROGRAMS / name), run_name="__main__")


def predicts(given: dict[str, Path], out: Path) -> float:
    """Loss per token on held-out text, as we load a checkpoint: transformers 5.17 leaves the global
    scales of NVFP4 experts out.
    """
    model = rd.load_model(out)
    assert model.config.num_experts == 24
    data = f"{given['held_out']}:2ktok"
    losses = []
    for _, batch in rd.calibration(given["model"], data, seq_len=SEQ_LEN):
        with torch.no_grad():
            losses.append(model(**batch, labels=batch["input_ids"]).loss)
    return float(torch.stack(losses).mean())


def test_reap_alone(given: dict[str, Path], tmp_path: Path) -> None:
    """The first MoE layer, which sees the same in both, keeps what `prune` keeps on the same text;
    the checkpoint is the one that the plan of its report gives.
    """
    data = f"{given['calibration']}:{TOKENS}"
    rd.prune(given["model"], data, 0.25, out=tmp_path / "own", seq_len=SEQ_LEN)
    own = rd.Plan.load(tmp_path / "own" / "reap" / "plan.json")
    whole = AutoModelForCausalLM.from_pretrained(given["model"])
    report = given["pruned"] / "kept.json"
    plan = llm_compressor_report.read(report, ModelFacts(rd.record_of(whole)))
    first = next(iter(plan.kept))
    assert plan.kept[first] == own.kept[first]
    rd.apply_plan(given["model"], plan, tmp_path / "ours")
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (tmp_path / "ours", given["pruned"])
        )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4"])
def test_reap_then_quantize(given: dict[str, Path], tmp_path: Path, scheme: str) -> None:
    words = ("--then", scheme, "--group-size", "32")
    run_program("reap_then_quantize.py", given, tmp_path / "both", *words)
    with safe_open(tmp_path / "both" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.0.mlp.experts.23.down_proj.weight_packed" in names
    assert "model.layers.0.mlp.gate.weight" in names
    plain, both = predicts(given, given["pruned"]), predicts(given, tmp_path / "both")
    assert plain < both < plain + 0.3
