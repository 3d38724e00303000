"""A pruned checkpoint is quantized by llm-compressor, and loads and predicts as it did before."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import reap_driver as rd
from tests.interop import after_pruning

PROGRAM = Path(__file__).parents[3] / "examples" / "quantize" / "with_llm_compressor.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both checkpoints, the text, and both quantized in each way."""
    folder = tmp_path_factory.mktemp("made")
    found = after_pruning.pair(folder)
    quantize = runpy.run_path(str(PROGRAM))["quantize"]
    data = f"{found['calibration']}:{after_pruning.TOKENS}"
    for name in ("whole", "pruned"):
        for scheme in ("w4a16", "fp8"):
            found[f"{name} {scheme}"] = out = folder / f"{name}-{scheme}"
            quantize(
                found[name],
                out,
                scheme=scheme,
                data=data,
                seq_len=after_pruning.SEQ_LEN,
                group_size=32,
            )
    return found


@pytest.mark.parametrize(("scheme", "largest_kl"), [("w4a16", 0.03), ("fp8", 0.01)])
def test_it_costs_what_it_costs_the_unpruned(made, scheme: str, largest_kl: float) -> None:
    own, control = (
        after_pruning.cost(made[name], made[f"{name} {scheme}"], made["held_out"])
        for name in ("pruned", "whole")
    )
    assert 1e-5 < own.kl.value < largest_kl
    # Half of the experts do what all did, so that each of their errors counts more.
    assert own.kl.value < 2 * control.kl.value
    assert own.same_top.value > 0.93


@pytest.mark.parametrize("scheme", ["w4a16", "fp8"])
def test_transformers_loads_it(made, scheme: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(made[f"pruned {scheme}"])
    experts = model.config.num_experts
    assert experts == 16
    plain = AutoModelForCausalLM.from_pretrained(made["pruned"], dtype="auto")
    batch = next(iter(rd.calibration(made["pruned"], made["held_out"], seq_len=64)))[1]
    with torch.no_grad():
        ours, theirs = (m(**batch).logits.float().log_softmax(-1) for m in (plain, model))
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 0.05


@pytest.mark.parametrize("scheme", ["w4a16", "fp8"])
def test_routers_stay_plain_and_experts_do_not(made, scheme: str) -> None:
    with safe_open(made[f"pruned {scheme}"] / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    gate = "model.layers.0.mlp.gate"
    assert {name for name in names if name.startswith(gate)} == {f"{gate}.weight"}
    for expert in range(16):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.0.mlp.experts.{expert}.{matrix}.weight_scale" in names


def test_the_record_of_the_pruning_stays(made) -> None:
    plan = rd.Plan.load(made["pruned w4a16"] / "reap" / "plan.json")
    assert plan.kept == rd.Plan.load(made["pruned"] / "reap" / "plan.json").kept
    found = rd.compare(made["whole"], made["pruned fp8"], f"{made['held_out']}:1ktok", seq_len=64)
    assert any("was quantized after it was pruned" in note for note in found.notes)
