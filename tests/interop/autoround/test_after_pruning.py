"""A pruned checkpoint is quantized by AutoRound, and loads and predicts as it did before."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import reap_driver as rd
from tests.interop import after_pruning

PROGRAM = Path(__file__).parents[3] / "examples" / "quantize" / "with_auto_round.py"
SCHEMES = {"W4A16": 4, "W3A16": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both checkpoints, the text, and both quantized in each way."""
    folder = tmp_path_factory.mktemp("made")
    found = after_pruning.pair(folder)
    quantize = runpy.run_path(str(PROGRAM))["quantize"]
    data = f"{found['calibration']}:{after_pruning.TOKENS}"
    for name in ("whole", "pruned"):
        for scheme in SCHEMES:
            made_in = quantize(
                found[name],
                folder / "quantized",
                scheme=scheme,
                data=data,
                seq_len=after_pruning.SEQ_LEN,
                group_size=32,
                iters=0,
            )
            found[f"{name} {scheme}"] = Path(made_in)
    return found


def cost(before: Path, after: Path, text: Path) -> dict[str, float]:
    """What quantizing changed, by our own reading of the checkpoint, in a process without
    AutoRound, which changes the classes of experts where it is imported.
    """
    words = ["compare", before, after, "--data", f"{text}:4ktok", "--seq-len", "128", "--json"]
    command = [sys.executable, "-m", "reap_driver", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    overall = json.loads(done.stdout)["overall"]
    return {name: overall[name]["value"] for name in ("kl", "same_top")}


@pytest.mark.parametrize(("scheme", "largest_kl"), [("W4A16", 0.03), ("W3A16", 0.1)])
def test_it_costs_what_it_costs_the_unpruned(made, scheme: str, largest_kl: float) -> None:
    own, control = (
        cost(made[name], made[f"{name} {scheme}"], made["held_out"]) for name in ("pruned", "whole")
    )
    assert 1e-5 < own["kl"] < largest_kl
    # Half of the experts do what all did, so that each of their errors counts more.
    assert own["kl"] < 2.5 * control["kl"]
    assert own["same_top"] > 0.85


@pytest.mark.parametrize(("scheme", "largest_kl"), [("W4A16", 0.05), ("W3A16", 0.2)])
def test_transformers_loads_it(made, scheme: str, largest_kl: float) -> None:
    batch = next(iter(rd.calibration(made["pruned"], made["held_out"], seq_len=128)))[1]
    folders = (made["pruned"], made[f"pruned {scheme}"])
    models = [AutoModelForCausalLM.from_pretrained(f, dtype="auto").eval() for f in folders]
    with torch.no_grad():
        before, after = (model(**batch).logits.float().log_softmax(-1) for model in models)
    assert (before.exp() * (before - after)).sum(-1).mean() < largest_kl


@pytest.mark.parametrize(("scheme", "bits"), SCHEMES.items())
def test_routers_stay_plain_and_experts_do_not(made, scheme: str, bits: int) -> None:
    folder = made[f"pruned {scheme}"]
    config = json.loads((folder / "config.json").read_text())
    assert config["num_local_experts"] == 16  # transformers' own name, under which it saves
    assert config["quantization_config"]["bits"] == bits
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    gate = "model.layers.0.mlp.gate"
    assert {name for name in names if name.startswith(gate)} == {f"{gate}.weight"}
    for expert in range(16):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.0.mlp.experts.{expert}.{matrix}.qweight" in names


def test_the_record_of_the_pruning_stays(made) -> None:
    plan = rd.Plan.load(made["pruned W4A16"] / "reap" / "plan.json")
    assert plan.kept == rd.Plan.load(made["pruned"] / "reap" / "plan.json").kept
