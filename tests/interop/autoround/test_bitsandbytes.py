"""bitsandbytes: its dequantized weights, and checkpoints that it packed, observed and pruned."""

import itertools
import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from reap_driver.files.quantization import Quantization
from reap_driver.files.safetensors_file import read_header
from reap_driver.load.methods import plain_weights
from reap_driver.load.tensor_reader import TensorReader, stored
from tests.driver.cli.conftest import write_model
from tests.driver.formats.kept import weights
from tests.interop.whole_path import check_observed, pruned

Parts = dict[str, Tensor]
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def packed(weight: Tensor, **options: object) -> tuple[Parts, Tensor]:
    """A matrix of 4 bits as `Linear4bit` saves it, and as the library dequantizes it."""
    codes, state = functional.quantize_4bit(weight, **options)
    parts = {f"weight.{leaf}": part for leaf, part in state.as_dict(packed=True).items()}
    return {"weight": codes, **parts}, functional.dequantize_4bit(codes, state)


def integers(weight: Tensor) -> tuple[Parts, Tensor]:
    """A matrix of 8 bits as `Linear8bitLt` saves it, and as the library dequantizes it."""
    layer = bnb.nn.Linear8bitLt(*reversed(weight.shape), bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.to("cpu")
    parts = {name: part.clone() for name, part in layer.state_dict().items()}
    return parts, functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"])


def ours(parts: Parts, folder: Path) -> Tensor:
    path = folder / "model.safetensors"
    save_file({f"a.{leaf}": part.contiguous() for leaf, part in parts.items()}, path)
    reader = TensorReader()
    found = stored(read_header(path).tensors, reader)
    method = Quantization("bitsandbytes", FOUR)
    [matrix] = plain_weights(found, method, "here", torch.device("cpu")).values()
    value = matrix[...]
    reader.close()
    return value


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = list(
    itertools.product(
        ("nf4", "fp4"), DTYPES, (64, 128, 4096), (False, True), (torch.uint8, torch.bfloat16)
    )
)


@pytest.mark.parametrize(("kind", "dtype", "size", "nested", "storage"), CASES)
def test_four_bits(
    kind: str, dtype: torch.dtype, size: int, nested: bool, storage: torch.dtype, tmp_path: Path
) -> None:
    options = {"blocksize": size, "quant_type": kind, "compress_statistics": nested}
    parts, value = packed(torch.randn(16, 4096, dtype=dtype), quant_storage=storage, **options)
    made = ours(parts, tmp_path)
    assert made.dtype == value.dtype
    assert torch.equal(made, value)


@pytest.mark.parametrize("shape", [(64, 96), (33, 70), (5, 7), (40, 32)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_over_several_rows(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """Against the library's implementation in torch: on a CPU with AVX-512, its kernel of 0.50.2
    takes wrong scales where blocks cross rows, so that weights differ from the originals by twice
    as much.
    """
    weight = torch.randn(shape)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    parts = {f"weight.{leaf}": part for leaf, part in state.as_dict(packed=True).items()}
    value = _dequantize_4bit_compute(
        codes.flatten(), state.absmax, state.code, 64, shape, torch.float32
    )
    assert torch.equal(ours({"weight": codes, **parts}, tmp_path), value)
    assert (value - weight).abs().mean() < 0.12


def test_eight_bits(tmp_path: Path) -> None:
    parts, value = integers(torch.randn(48, 96))
    assert sorted(parts) == ["SCB", "weight", "weight_format"]
    assert torch.equal(ours(parts, tmp_path), value)


def checkpoint(folder: Path, experts: int, settings: dict[str, object]) -> tuple[Path, Path]:
    """A model whose linear layers are packed one by one, experts too, as transformers 4 wrote them;
    and one that holds what the library makes of them.
    """
    source = write_model(
        folder / "source", "mixtral", num_local_experts=experts, hidden_size=64,
        intermediate_size=128, head_dim=16, num_hidden_layers=2,
    )  # fmt: skip
    pack = packed if settings is FOUR else integers
    files: dict[str, Parts] = {"packed": {}, "plain": {}}
    for path in source.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            module = key.removesuffix("weight")
            linear = tensor.ndim == 2 and not any(n in key for n in ("embed", "lm_head", ".gate."))
            parts, value = pack(tensor) if linear else ({"weight": tensor}, tensor)
            files["packed"] |= {module + leaf: part for leaf, part in parts.items()}
            files["plain"][key] = value
    config = json.loads((source / "config.json").read_text())
    for name, tensors in files.items():
        (folder / name).mkdir()
        for path in source.glob("*.json"):
            if not path.name.endswith("index.json"):
                (folder / name / path.name).write_bytes(path.read_bytes())
        said = {"quantization_config": settings} if name == "packed" else {}
        (folder / name / "config.json").write_text(json.dumps({**config, **said}))
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / "packed", folder / "plain"


@pytest.mark.parametrize("settings", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("experts", [8, 16])
def test_packed_experts(experts: int, settings: dict[str, object], tmp_path: Path) -> None:
    """8 and 16: numbers that also divide the lengths of code tables and JSON texts."""
    model, plain = checkpoint(tmp_path, experts, settings)
    check_observed(model, plain, tmp_path)
    out = pruned(model, plain, tmp_path)
    keys = load_file(next(out.glob("*.safetensors"))).keys()
    assert any(key.endswith(".absmax" if settings is FOUR else ".SCB") for key in keys)


def test_what_transformers_writes(tmp_path: Path) -> None:
    """Attention alone is packed, double quantization included; the library dequantizes the same."""
    plain = write_model(tmp_path / "source", "qwen3_moe", hidden_size=64)
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(str(plain), quantization_config=options)
    model.save_pretrained(str(tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((plain / name).read_bytes())
    mine = weights(tmp_path / "model")
    theirs = model.dequantize(torch.float32).state_dict()
    packed_ = [key for key in theirs if "_proj" in key and "experts" not in key]
    assert packed_
    for key, value in theirs.items():
        assert torch.equal(mine[key], value.to(mine[key].dtype)), key
    pruned(tmp_path / "model", plain, tmp_path)
