"""Pruned checkpoints compute in MLX what transformers computes, read as they are."""

import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm import convert
from mlx_lm.utils import load_model
from transformers import AutoConfig

from tests.interop.engines.fixtures import Compare, Pairs, Ran
from tests.interop.engines.models import (
    BOUND,
    TOKENS,
    Checkpoint,
    difference,
    divergence,
    write_narrow,
    write_unequal,
)
from tests.interop.engines.sources import SOURCES

mx.set_default_device(mx.cpu)
ROWS = list(range(len(TOKENS)))
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_k")
UNKNOWN = ("granitemoeshared", "hunyuan_v1_moe", "flex_olmo")
# mlx-lm drops DeepSeek's layer of multi-token prediction by its number in the published model, 61.
# The small whole one has it as layer 5, which is left out as any tensor of no use.
EXTRA = {("deepseek_v3", "whole")}


def logprobs(model: nn.Module) -> torch.Tensor:
    """`[ROWS, vocabulary]` float32."""
    logits = np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))
    return torch.from_numpy(logits).log_softmax(-1)


def run(checkpoint: Checkpoint, strict: bool = True) -> Ran:
    """What MLX says of a checkpoint."""
    model, _ = load_model(checkpoint.folder, strict=strict)
    [experts] = {getattr(model.args, name) for name in COUNTS if hasattr(model.args, name)}
    [top_k] = {getattr(model.args, name) for name in TOP_K if hasattr(model.args, name)}
    stacked = [
        tensor.shape[0]
        for name, tensor in tree_flatten(model.parameters())
        if "self_attn" not in name and name.endswith("weight") and tensor.ndim == 3
    ]
    assert set(stacked) == {experts}
    return Ran(experts, top_k, ROWS, logprobs(model))


@pytest.mark.parametrize("architecture", SOURCES)
def test_logprobs_are_those_of_transformers(architecture: str, compare: Compare) -> None:
    if architecture in UNKNOWN:
        message = f"Model type {architecture} not supported"
        compare.refuse(architecture, run, message, "not known")
        return

    def load(checkpoint: Checkpoint) -> Ran:
        return run(checkpoint, strict=(architecture, checkpoint.folder.name) not in EXTRA)

    compare.agree(architecture, load)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_experts_with_fewer_neurons_compute_the_same(
    architecture: str, pairs: Pairs, tmp_path: Path
) -> None:
    checkpoint = write_narrow(pairs(architecture), tmp_path / "narrow")
    model, _ = load_model(checkpoint.folder)
    assert model.args.moe_intermediate_size == 24
    assert difference(checkpoint, ROWS, logprobs(model)) < BOUND


def test_eight_bits_cost_the_pruned_model_little(pairs: Pairs, tmp_path: Path) -> None:
    """What `mlx_lm.convert --quantize` writes, in groups of 32 for the narrow model."""
    checkpoint, out = pairs("qwen3_moe").pruned, tmp_path / "quantized"
    convert(str(checkpoint.folder), str(out), quantize=True, q_bits=8, q_group_size=32)
    model, _ = load_model(out)
    assert 1e-5 < divergence(checkpoint, ROWS, logprobs(model)) < 5e-3


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe", "minimax_m2"])
def test_a_config_that_transformers_saved_is_refused(
    architecture: str, pairs: Pairs, tmp_path: Path
) -> None:
    """Pruning keeps the names of fields; saving makes `rope_parameters` of `rope_theta`."""
    folder = shutil.copytree(pairs(architecture).pruned.folder, tmp_path / "saved")
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(TypeError, match="rope_theta"):
        load_model(folder)


def test_a_config_that_transformers_saved_loses_the_scaling_of_positions(
    pairs: Pairs, tmp_path: Path
) -> None:
    """DeepSeek's, silently: the reason to prune what was published."""
    checkpoint = pairs("deepseek_v3").pruned
    folder = shutil.copytree(checkpoint.folder, tmp_path / "saved")
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    model, _ = load_model(folder)
    assert divergence(checkpoint, ROWS, logprobs(model)) > 1e-3


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_layers_of_unequal_counts_are_refused(
    architecture: str, pairs: Pairs, tmp_path: Path
) -> None:
    unequal = write_unequal(pairs(architecture), tmp_path / "unequal")
    with pytest.raises(KeyError, match="experts"):
        load_model(unequal)
