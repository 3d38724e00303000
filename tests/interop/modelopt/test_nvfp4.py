"""NVFP4 of ModelOpt: its dequantized weights, and checkpoints that it exported."""

import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from reap_driver.load.resident import load_model
from reap_kernels.errors import UnsupportedModel
from tests.driver.cli.conftest import write_model
from tests.driver.formats.kept import check_kept_files, weights
from tests.driver.load.values import nvfp4
from tests.driver.published.checkpoint import write_tokenizer
from tests.interop.whole_path import check_observed, dequantized, prune_by_plan_of, pruned

LEAVES = ("weight", "weight_scale", "weight_scale_2")


def library(parts: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What the library makes of a matrix."""
    codes = parts["weight"]
    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    scales = {"scale": parts["weight_scale"], "double_scale": parts["weight_scale_2"]}
    return NVFP4QTensor(shape, dtype, codes).dequantize(dtype, block_sizes={-1: 16}, **scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_the_definition_is_the_librarys(seed: int, dtype: torch.dtype) -> None:
    """Random codes and scales; tests of the default run compare ours with the definition, which is
    rounded to the dtype of the run when it is loaded.
    """
    parts, value = nvfp4(32, 96, compressed=False, seed=seed)
    assert torch.equal(library(parts, dtype), value.to(dtype))


def export(folder: Path, name: str, config: dict[str, object]) -> Path:
    """A checkpoint quantized by ModelOpt, beside its source."""
    source = write_model(
        folder / "source", name, hidden_size=64, moe_intermediate_size=32, head_dim=16
    )
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.bfloat16)
    ids = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    mtq.quantize(model, config, lambda model: model(ids))
    with torch.no_grad():
        export_hf_checkpoint(model, export_dir=str(folder / "model"))
    return folder / "model"


def test_a_checkpoint(tmp_path: Path) -> None:
    """Observed as the library dequantizes it, and pruned; also where config.json, as of older
    versions, leaves the settings to hf_quant_config.json.
    """
    model = export(tmp_path, "qwen3_moe", mtq.NVFP4_DEFAULT_CFG)
    keys = load_file(model / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.0.down_proj.weight_scale_2" in keys
    assert "model.layers.0.mlp.gate.weight_scale_2" not in keys
    plain = dequantized(model, tmp_path / "plain", LEAVES, library)
    check_observed(model, plain, tmp_path)
    pruned(model, tmp_path / "source", tmp_path)
    config = json.loads((model / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "modelopt"
    (model / "config.json").write_text(json.dumps(config))
    mine, theirs = weights(model), weights(plain)
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_fp8_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    """A plan of the original prunes it: scales of kept experts stay with their codes."""
    model = export(tmp_path, "qwen3_moe", mtq.FP8_DEFAULT_CFG)
    write_tokenizer(model)
    says = "quant_algo .* is 'FP8'; NVFP4 or W4A16_NVFP4 can be read: observe the checkpoint"
    with pytest.raises(UnsupportedModel, match=says):
        load_model(model)
    kept = prune_by_plan_of(tmp_path / "source", model, tmp_path / "out", tmp_path)
    check_kept_files(model, tmp_path / "out", kept)
