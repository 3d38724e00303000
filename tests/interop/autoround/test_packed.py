"""AutoRound: every weight as it computes with it; checkpoints that it packed, observed and pruned.

The library is imported first, which exchanges classes of transformers.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file, save_file
from torch import Tensor

from reap_driver.files.quantization import Quantization
from reap_driver.files.safetensors_file import read_header
from reap_driver.load.methods import plain_weights
from reap_driver.load.tensor_reader import TensorReader, stored
from tests.driver.cli.conftest import write_model
from tests.interop.autoround.quantize import GROUP, VARIANTS
from tests.interop.packed_models import check_pruned, check_weights, in_own_process
from tests.interop.whole_path import check_observed, dequantized

CPU = torch.device("cpu")
LEAVES = ("qweight", "qzeros", "scales")
Parts = dict[str, Tensor]


def _linear(kind: type) -> Callable[[Parts], Tensor]:
    """What AutoRound's layer of this class computes with, given its tensors."""

    def value(parts: Parts) -> Tensor:
        groups, outputs = parts["scales"].shape
        inputs = groups * GROUP
        bits = len(parts["qweight"]) * 32 // inputs
        layer = kind(bits, GROUP, inputs, outputs, bias=False)
        layer.load_state_dict(parts)
        return layer(torch.eye(inputs, dtype=torch.float16)).T.contiguous()

    return value


def _gemm(parts: Parts) -> Tensor:
    return dequantize_gemm(
        *(parts[leaf] for leaf in LEAVES), bits=4, group_size=GROUP
    ).T.contiguous()


less_one, as_is = _linear(qlinear_torch_zp.QuantLinear), _linear(qlinear_torch.QuantLinear)
VALUES = {
    "symmetric": less_one,
    "three-bits": as_is,
    "mixed": less_one,
    "awq": _gemm,
    "as-gptq": less_one,
    "as-awq": _gemm,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    return write_model(tmp_path_factory.mktemp("plain") / "model", "qwen3_moe", **sizes)


@pytest.fixture(scope="module")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized")
    in_own_process("tests.interop.autoround.quantize", plain, out)
    return out


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant[2]])
def test_as_transformers_loads_it(name: str, quantized: Path) -> None:
    folder = quantized / name
    expected = load_file(folder / "expected.safetensors")
    (folder / "expected.safetensors").unlink()  # no file of a checkpoint
    check_weights(folder, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_observed_and_pruned(name: str, quantized: Path, plain: Path, tmp_path: Path) -> None:
    folder = quantized / name
    (folder / "expected.safetensors").unlink(missing_ok=True)
    theirs = dequantized(folder, tmp_path / "theirs", LEAVES, VALUES[name])
    check_observed(folder, theirs, tmp_path)
    small, masked = check_pruned(folder, plain, tmp_path)
    assert torch.allclose(small, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_number_of_bits(bits: int, packing: str, symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    inputs, outputs, most = 96, 64, 1 << bits
    kind = qlinear_torch if packing == "auto_round" else qlinear_torch_zp
    layer = kind.QuantLinear(bits, GROUP, inputs, outputs, bias=False)
    layer.device = CPU
    scales = torch.rand(outputs, inputs // GROUP) / most
    zeros = torch.randint(1, most, scales.shape).float()
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    layer.pack(linear, scales, most // 2 if symmetric else zeros)
    path = tmp_path / "model.safetensors"
    save_file({f"a.{name}": part for name, part in layer.state_dict().items()}, path)
    settings = {"bits": bits, "group_size": GROUP, "sym": symmetric, "packing_format": packing}
    reader = TensorReader()
    quantization = Quantization("auto-round", settings)
    tensors = plain_weights(stored(read_header(path).tensors, reader), quantization, "here", CPU)
    found = tensors["a.weight"][...]
    reader.close()
    assert torch.equal(found, layer(torch.eye(inputs, dtype=torch.float16)).T)
