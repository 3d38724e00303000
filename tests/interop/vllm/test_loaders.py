"""Pruned checkpoints compute in vLLM, on a CPU, what transformers computes."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import reap_driver as rd
from tests.interop.engines.fixtures import Compare, Pairs, Ran
from tests.interop.engines.models import (
    BOUND,
    MOVED,
    Checkpoint,
    difference,
    distance,
    write_kept,
    write_narrow,
    write_pair,
    write_unequal,
)
from tests.interop.engines.sources import SOURCES
from tests.interop.vllm.loading import run


def agrees(checkpoint: Checkpoint) -> None:
    """vLLM finds the experts of a checkpoint and computes what transformers computes."""
    ran = run(checkpoint.folder)
    assert (ran.experts, ran.top_k) == (checkpoint.experts, checkpoint.top_k)
    assert difference(checkpoint, ran.rows, ran.logprobs) < BOUND


@pytest.mark.parametrize("architecture", SOURCES)
def test_logprobs_are_those_of_transformers(architecture: str, compare: Compare) -> None:
    def load(checkpoint: Checkpoint) -> Ran:
        return run(checkpoint.folder)

    if architecture == "minimax_m2":
        message = r'assert self.scoring_func == "softmax"'
        compare.refuse(architecture, load, message, "not on CPUs")
    else:
        compare.agree(architecture, load)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe"])
def test_experts_with_fewer_neurons_compute_the_same(
    architecture: str, pairs: Pairs, tmp_path: Path
) -> None:
    agrees(write_narrow(pairs(architecture), tmp_path / "narrow"))


@pytest.mark.parametrize(
    ("architecture", "kept"), [("qwen3_moe", 103), ("qwen3_moe", 8), ("mixtral", 3)]
)
def test_any_number_of_experts_is_served(
    architecture: str, kept: int, pairs: Pairs, tmp_path: Path
) -> None:
    """Odd ones, and as few as a token is routed to."""
    checkpoint = write_kept(pairs(architecture), kept, tmp_path / "kept")
    assert rd.check(checkpoint.folder, serve="vllm").obstacles == ()
    agrees(checkpoint)


def test_pruned_layers_of_multi_token_prediction_are_left_out(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("glm4_moe")
    rd.apply_plan(pair.whole.folder, pair.plan, tmp_path / "pruned", mtp="prune")
    config = json.loads((tmp_path / "pruned/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    ran = run(tmp_path / "pruned")
    assert ran.experts == pair.pruned.experts
    assert difference(pair.pruned, ran.rows, ran.logprobs) < BOUND


def test_a_bias_of_experts_that_the_router_lacks_on_cpus(tmp_path: Path) -> None:
    """ERNIE's; where this fails, the table can be measured with a bias."""
    whole = write_pair("ernie4_5_moe", tmp_path).whole
    ran = run(whole.folder)
    assert distance(whole, ran.rows, ran.logprobs) > MOVED


def test_a_missing_expert_is_loaded_silently_and_seen_in_the_numbers(
    pairs: Pairs, tmp_path: Path
) -> None:
    """Deleting tensors without renumbering those that stay is no pruning."""
    whole = pairs("qwen3_moe").whole
    tmp_path.joinpath("config.json").write_text((whole.folder / "config.json").read_text())
    tensors = {
        name: tensor
        for file in sorted(whole.folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if ".experts.5." not in name
    }
    save_file(tensors, tmp_path / "model.safetensors")
    ran = run(tmp_path)
    assert ran.experts == whole.experts
    assert not distance(whole, ran.rows, ran.logprobs) < MOVED  # which NaN is not either


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "glm4_moe", "granitemoe"])
def test_layers_of_unequal_counts_are_refused(
    architecture: str, pairs: Pairs, tmp_path: Path
) -> None:
    unequal = write_unequal(pairs(architecture), tmp_path / "unequal")
    [obstacle] = rd.check(unequal, serve="vllm").obstacles
    assert "different numbers of experts" in obstacle
    with pytest.raises(Exception, match="load weight"):
        run(unequal)
