"""torchao: its dequantized weights, and checkpoints that transformers wrote with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
from transformers import AutoModelForCausalLM, TorchAoConfig

from reap_driver.files.quantization import Quantization
from reap_driver.files.safetensors_file import read_header
from reap_driver.load.methods import plain_weights
from reap_driver.load.tensor_reader import TensorReader, stored
from tests.driver.cli.conftest import write_model
from tests.driver.formats.kept import read_files, weights
from tests.interop.whole_path import pruned

CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int8 in groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int8 and activations": Int8DynamicActivationInt8WeightConfig(),
    "fp8 by rows": Float8WeightOnlyConfig(granularity=PerRow()),
    "fp8 one scale": Float8WeightOnlyConfig(granularity=PerTensor()),
    "int4 unpacked": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int3 unpacked": IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_dequantized(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(96, 64, bias=False, dtype=dtype))
    quantize_(layers, CONFIGS[name])
    value: Tensor = layers[0].weight.dequantize()
    path = tmp_path / "model.safetensors"
    tensors, metadata = flatten_tensor_state_dict({"a.weight": layers[0].weight})
    save_file({key: part.contiguous() for key, part in tensors.items()}, path, metadata=metadata)
    reader = TensorReader()
    found = stored(read_header(path).tensors, reader)
    made = plain_weights(found, Quantization("torchao", {"a": 1}), "here", torch.device("cpu"))
    assert list(made) == ["a.weight"]
    mine = made["a.weight"][...]
    reader.close()
    assert mine.dtype == value.dtype == dtype
    assert torch.equal(mine, value)


@pytest.mark.parametrize("name", ["int8", "fp8 by rows", "int4 unpacked"])
def test_what_transformers_writes(name: str, tmp_path: Path) -> None:
    """Attention alone is quantized, whose weights are the library's, and it is pruned."""
    plain = write_model(tmp_path / "source", "qwen3_moe", hidden_size=64, head_dim=16)
    options = TorchAoConfig(quant_type=CONFIGS[name])
    model = AutoModelForCausalLM.from_pretrained(
        str(plain), dtype=torch.bfloat16, quantization_config=options
    )
    model.save_pretrained(str(tmp_path / "model"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((plain / file).read_bytes())
    keys = read_files(tmp_path / "model").keys()
    assert "model.layers.0.self_attn.q_proj._weight_qdata" in keys
    mine = weights(tmp_path / "model")
    for key, value in model.state_dict().items():
        theirs = value.dequantize() if hasattr(value, "qdata") else value
        assert torch.equal(mine[key], theirs), key
    pruned(tmp_path / "model", plain, tmp_path)
