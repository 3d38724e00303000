"""NVFP4 of compressed-tensors: dequantized weights, and a checkpoint that llm-compressor wrote."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.driver.cli.conftest import write_model
from tests.driver.load.values import nvfp4
from tests.interop.whole_path import check_observed, dequantized, pruned

SCHEME: QuantizationScheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
LEAVES = ("weight_packed", "weight_scale", "weight_global_scale")


def library(parts: dict[str, Tensor]) -> Tensor:
    """What the library makes of a matrix."""
    return NVFP4PackedCompressor.decompress(parts, SCHEME)["weight"].data


@pytest.mark.parametrize("seed", range(4))
def test_the_definition_is_the_librarys(seed: int) -> None:
    """Random codes and scales; tests of the default run compare ours with the definition."""
    parts, value = nvfp4(32, 96, compressed=True, seed=seed)
    theirs = library(parts)
    assert theirs.dtype == value.dtype
    assert torch.equal(theirs, value)


def test_a_checkpoint(tmp_path: Path) -> None:
    """Observed as the library dequantizes it, and pruned; layers to be left out are."""
    source = write_model(
        tmp_path / "source", "qwen3_moe", hidden_size=64, moe_intermediate_size=32, head_dim=16
    )
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.bfloat16)
    left = ["lm_head", "re:.*mlp.gate$", "re:.*o_proj$"]
    oneshot(
        model=model, recipe=QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=left)
    )
    model.save_pretrained(str(tmp_path / "model"), save_compressed=True)
    keys = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.0.down_proj.weight_packed" in keys
    assert "model.layers.0.self_attn.o_proj.weight" in keys
    plain = dequantized(tmp_path / "model", tmp_path / "plain", LEAVES, library)
    check_observed(tmp_path / "model", plain, tmp_path)
    pruned(tmp_path / "model", source, tmp_path)
