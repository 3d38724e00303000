"""Models that GPTQModel quantized: its weights, observed and pruned."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.driver.cli.conftest import write_model
from tests.interop.gptqmodel.quantize import VARIANTS
from tests.interop.packed_models import check_pruned, check_weights, in_own_process

SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain") / "model", "qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized")
    in_own_process("tests.interop.gptqmodel.quantize", plain, out)
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_as_the_library_dequantizes_it(name: str, quantized: Path) -> None:
    check_weights(quantized / name, load_file(quantized / f"{name}.safetensors"))


@pytest.mark.parametrize("name", VARIANTS)
def test_observed_and_pruned(name: str, quantized: Path, plain: Path, tmp_path: Path) -> None:
    small, masked = check_pruned(quantized / name, plain, tmp_path)
    assert torch.allclose(small, masked, rtol=1e-4, atol=1e-5)
