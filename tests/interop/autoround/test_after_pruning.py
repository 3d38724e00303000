"""A pruned checkpoint is quantized by AutoRound, and loads and predicts as it did before."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
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
                iters=2,
            )
            found[f"{name} {scheme}"] = Path(made_in)
    return found


@pytest.fixture(scope="module")
def logits(made) -> dict[str, Tensor]:
    """Log-probabilities [tokens, V] of every checkpoint on held-out text, by transformers."""
    batches = rd.calibration(made["pruned"], f"{made['held_out']}:2ktok", seq_len=128)
    rows = torch.cat([b["input_ids"] for _, b in batches if b["input_ids"].shape[1] == 128])
    found = {}
    for name, folder in made.items():
        if not folder.is_dir():
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.no_grad():
            found[name] = model(input_ids=rows).logits.float().log_softmax(-1).flatten(0, 1)
    return found


def kl(before: Tensor, after: Tensor) -> float:
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize(("scheme", "largest_kl"), [("W4A16", 0.05), ("W3A16", 0.2)])
def test_it_costs_what_it_costs_the_unpruned(logits, scheme: str, largest_kl: float) -> None:
    own = kl(logits["pruned"], logits[f"pruned {scheme}"])
    control = kl(logits["whole"], logits[f"whole {scheme}"])
    assert 1e-5 < own < largest_kl
    # Half of the experts do what all did, so that each of their errors counts more.
    assert own < 2.5 * control
    same = logits["pruned"].argmax(-1) == logits[f"pruned {scheme}"].argmax(-1)
    assert same.float().mean() > 0.8


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
