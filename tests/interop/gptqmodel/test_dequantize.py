"""Matrices of GPTQ and AWQ: every bit as GPTQModel dequantizes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import FORMAT, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import (
    convert_gptq_v1_to_v2_format_module,
    convert_gptq_v2_to_v1_format_module,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from reap_driver.files.quantization import Quantization
from reap_driver.files.safetensors_file import read_header
from reap_driver.load.methods import plain_weights
from reap_driver.load.tensor_reader import TensorReader, stored

CPU = torch.device("cpu")
IN, OUT = 96, 64


def ours(folder: Path, module: nn.Module, settings: dict[str, Any]) -> Tensor:
    """The weight that we make of a module's saved tensors."""
    path = folder / "model.safetensors"
    state = {f"a.b.{name}": tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, path)
    reader = TensorReader()
    quantization = Quantization(settings["quant_method"], settings)
    tensors = plain_weights(stored(read_header(path).tensors, reader), quantization, "here", CPU)
    try:
        return tensors["a.b.weight"][...]
    finally:
        reader.close()


def random_grid(bits: int, group: int, symmetric: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear layer, and scales and zero points [outputs, groups] for it."""
    torch.manual_seed(bits + group)
    most, groups = 1 << bits, -(-IN // group)
    linear = nn.Linear(IN, OUT, bias=False)
    scales = torch.rand(OUT, groups) / most
    zeros = torch.randint(0, most, (OUT, groups))
    return linear, scales, torch.full_like(zeros, most // 2) if symmetric else zeros


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("stored_as", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 16), (4, -1), (4, 64), (8, 32)])
def test_gptq(
    bits: int, group: int, stored_as: str, symmetric: bool, ordered: bool, tmp_path: Path
) -> None:
    wide = IN if group == -1 else group
    linear, scales, zeros = random_grid(bits, wide, symmetric)
    groups = torch.arange(IN, dtype=torch.int32) // wide
    if ordered:
        groups = groups[torch.randperm(IN)]
    fields = {"bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered}
    module = TorchLinear(**fields, in_features=IN, out_features=OUT, format=FORMAT(stored_as))
    module.pack(linear, scales, zeros, groups)
    expected = module.dequantize_weight().T
    meta = {"quantizer": ["gptqmodel:7.6.0"]}
    settings = {"quant_method": "gptq", "checkpoint_format": stored_as, "meta": meta, **fields}
    if stored_as == "gptq":
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
    found = ours(tmp_path, module, settings)
    assert found.dtype == expected.dtype == torch.float16
    assert torch.equal(found, expected)
    if stored_as == "gptq":  # as the library reads it back
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
        assert torch.equal(found, module.dequantize_weight().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 32, -1])
def test_awq(group: int, symmetric: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    wide = IN if group == -1 else group
    linear, scales, zeros = random_grid(4, wide, symmetric)
    module = AwqTorchLinear(
        bits=4, group_size=group, sym=symmetric, desc_act=False, in_features=IN, out_features=OUT
    )
    module.pack(linear, scales.to(dtype), zeros.to(dtype))
    parts = (module.qweight, module.qzeros, module.scales)
    expected = dequantize_gemm(*parts, bits=4, group_size=wide).T
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    found = ours(tmp_path, module, settings)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)
