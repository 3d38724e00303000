"""Pruned checkpoints compute in MLX what transformers computes, read as they are."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tests.interop.engines.fixtures import Compare, Pairs, Ran
from tests.interop.engines.models import PUBLISHED, TOKENS, Checkpoint, write_unequal

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# mlx-lm drops DeepSeek's layer of multi-token prediction by its number in the published model, 61.
# The small whole one has it as layer 5, which is left out as any tensor of no use.
EXTRA = {("deepseek_v3", "whole")}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_logprobs_are_those_of_transformers(architecture: str, compare: Compare) -> None:
    mx.set_default_device(mx.cpu)

    def run(checkpoint: Checkpoint) -> Ran:
        strict = (architecture, checkpoint.folder.name) not in EXTRA
        model, _ = load_model(checkpoint.folder, strict=strict)
        [experts] = {getattr(model.args, name) for name in COUNTS if hasattr(model.args, name)}
        stacked = [
            layer.shape[0]
            for name, layer in tree_flatten(model.parameters())
            if "switch_mlp" in name and name.endswith("weight")
        ]
        assert set(stacked) == {experts}
        logits = np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))
        said = torch.from_numpy(logits).log_softmax(-1)
        return Ran(experts, model.args.num_experts_per_tok, list(range(len(TOKENS))), said)

    compare(architecture, run)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_layers_of_unequal_counts_are_refused(
    architecture: str, pairs: Pairs, tmp_path: Path
) -> None:
    unequal = write_unequal(pairs(architecture).whole, tmp_path / "unequal")
    with pytest.raises(KeyError, match="experts"):
        load_model(unequal)
