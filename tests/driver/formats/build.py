"""A tiny checkpoint in every storage format, its tensors written by the format's layout.

No quantizer is needed: names, dtypes and shapes are those of the published formats, the codes are
random. What must be read right (the formats that are observed) is checked elsewhere against
definitions; here it is decided whether a format is read at all.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.driver.cli.conftest import write_model
from tests.driver.load import values
from tests.driver.streaming import packing
from tests.driver.writer.test_packed_router import Codes

Parts = dict[str, Tensor]
Pack = Callable[[int, int], Parts]

# Matrices whose sizes fill words and groups of every format.
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1}
_UNPACKED = re.compile(r"embed|lm_head|norm|vision|visual|sinks|per_layer")
_ROUTER = re.compile(r"\.(gate|router|router\.proj)\.weight$")
_STACKED = re.compile(r"^(.*experts)\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Format:
    """A format, in a layout it comes in.

    Attributes:
        name: as its users know it.
        layout: what is stored how.
        settings: the `quantization_config`.
        pack: parts of a matrix [out, in], by their last name; None leaves the matrices.
        model: architecture of the zoo.
        routers: whether routers are packed too.
        change: makes other tensors of the whole; given all, and the pack function.
        dtype: of what is not packed.
        describe: makes the metadata of the file; given all tensors.
    """

    name: str
    layout: str
    settings: dict[str, Any] | None
    pack: Pack | None = None
    model: str = "qwen3_moe"
    routers: bool = False
    change: Callable[[Parts, Pack], Parts] | None = None
    dtype: torch.dtype = torch.bfloat16
    describe: Callable[[Parts], dict[str, str]] | None = None

    @property
    def id(self) -> str:
        return f"{self.name}, {self.layout}"

    def write(self, source: Path, folder: Path) -> Path:
        """The format's checkpoint beside a plain one of the same model."""
        tensors = {key: _cast(tensor, self.dtype) for key, tensor in read(source).items()}
        pack = self.pack or _left
        if self.change is not None:
            tensors = self.change(tensors, pack)
        packed: Parts = {}
        for key, tensor in tensors.items():
            packed |= self._parts(key, tensor, pack)
        folder.mkdir()
        for path in source.iterdir():
            if path.suffix == ".json" and not path.name.endswith("index.json"):
                (folder / path.name).write_bytes(path.read_bytes())
        metadata = {"format": "pt", **({} if self.describe is None else self.describe(packed))}
        save_file(packed, folder / "model.safetensors", metadata=metadata)
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.settings is not None:
            config["quantization_config"] = self.settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _parts(self, key: str, tensor: Tensor, pack: Pack) -> Parts:
        plain = tensor.ndim != 2 or not key.endswith(".weight") or tensor.dtype != self.dtype
        if self.pack is None or plain or _UNPACKED.search(key):
            return {key: tensor}
        if _ROUTER.search(key) and not self.routers:
            return {key: tensor}
        module = key.removesuffix("weight")
        return {module + leaf: part for leaf, part in pack(*tensor.shape).items()}


def plain_model(folder: Path, architecture: str) -> Path:
    """The model that all formats of an architecture store."""
    sizes = {**SIZES, "num_experts": 16} if architecture == "qwen3_moe" else dict(SIZES)
    if architecture in ("gpt_oss", "llama4"):  # whose experts have the models' own width
        sizes["intermediate_size"] = sizes.pop("moe_intermediate_size")
    if architecture in ("gemma4", "gpt_oss"):
        sizes["layer_types"] = ["full_attention"]  # type: ignore[assignment]
    return write_model(folder, architecture, **sizes)


def read(folder: Path) -> Parts:
    """Every tensor."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _left(rows: int, columns: int) -> Parts:
    return {"weight": torch.randn(rows, columns).bfloat16() / math.sqrt(columns)}


# -- parts of a matrix -----------------------------------------------------------------------------


def fp8_blocks(rows: int, columns: int) -> Parts:
    grid = -(-rows // 128), -(-columns // 128)
    return {"weight": _fp8(rows, columns), "weight_scale_inv": torch.rand(grid) / 100}


def fp8_modelopt(rows: int, columns: int) -> Parts:
    return {
        "weight": _fp8(rows, columns),
        "weight_scale": torch.rand(()) / 100,
        "input_scale": torch.rand(()),
    }


def nvfp4(rows: int, columns: int) -> Parts:
    """As ModelOpt has it: two codes a byte, a scale for 16, a scale for all."""
    return {**values.nvfp4(rows, columns, compressed=False)[0], "input_scale": torch.rand(())}


def nvfp4_compressed(rows: int, columns: int) -> Parts:
    return values.nvfp4(rows, columns, compressed=True)[0]


def gptq(rows: int, columns: int) -> Parts:
    return Codes.random(rows, columns, 4, 16).gptq(4)


def awq(rows: int, columns: int) -> Parts:
    return Codes.random(rows, columns, 4, 16).awq()


def bnb_4bit(rows: int, columns: int) -> Parts:
    return values.blocks(rows, columns)[0]


def bnb_8bit(rows: int, columns: int) -> Parts:
    return values.rows_of_bytes(rows, columns)[0]


def hqq(rows: int, columns: int) -> Parts:
    groups = rows * columns // 64
    return {
        "W_q": _bytes(32, groups),
        "scale": torch.rand(1, groups).bfloat16(),
        "zero": torch.rand(1, groups).bfloat16(),
    }


def eetq(rows: int, columns: int) -> Parts:
    return {
        "weight": torch.randint(-128, 128, (columns, rows)).to(torch.int8),
        "weight_scales": torch.rand(rows).half(),
    }


def quanto(rows: int, columns: int) -> Parts:
    return {
        "weight._data": torch.randint(-128, 128, (rows, columns)).to(torch.int8),
        "weight._scale": torch.rand(rows, 1).bfloat16(),
        "input_scale": torch.ones(()),
        "output_scale": torch.ones(()),
    }


def torchao(rows: int, columns: int) -> Parts:
    return values.scaled(rows, columns, group=32)[0]


def packed_int4(rows: int, columns: int) -> Parts:
    return packing.integers(rows, columns, np.random.default_rng(rows))[0]


def plain_int8(rows: int, columns: int) -> Parts:
    rng = np.random.default_rng(rows)
    return packing.integers(rows, columns, rng, bits=8, group=None, packed=False)[0]


def plain_fp8(rows: int, columns: int) -> Parts:
    return {"weight": _fp8(rows, columns), "weight_scale": (torch.rand(rows, 1) / 100).bfloat16()}


def _fp8(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape).to(torch.uint8)


# -- layouts of experts ----------------------------------------------------------------------------


def by_expert(tensors: Parts, pack: Pack) -> Parts:
    """Stacked experts as files of quantizers have them: `experts.<i>.<projection>.<part>`."""
    return _unstacked(tensors, pack, "{stack}.{number}.{projection}.{leaf}")


def by_projection(tensors: Parts, pack: Pack) -> Parts:
    """As ModelOpt writes them: `experts.<projection>.<i>.<part>`."""
    return _unstacked(tensors, pack, "{stack}.{projection}.{number}.{leaf}")


def _unstacked(tensors: Parts, pack: Pack, name: str) -> Parts:
    made: Parts = {}
    for key, tensor in tensors.items():
        found = _STACKED.match(key)
        if found is None:
            made[key] = tensor
            continue
        stack, stem = found.groups()
        for number in range(len(tensor)):
            for projection in ("gate_proj", "up_proj") if stem == "gate_up_proj" else (stem,):
                out, inside = (32, 64) if stem == "gate_up_proj" else (64, 32)
                for leaf, part in pack(out, inside).items():
                    at = {"stack": stack, "number": number, "projection": projection}
                    made[name.format(**at, leaf=leaf)] = part
    return made


def stacked_nvfp4(tensors: Parts, _: Pack) -> Parts:
    """`experts.gate_up_proj` of two codes a byte, its scales beside it."""

    def packed(key: str, tensor: Tensor) -> Parts:
        count, rows, columns = tensor.shape
        return {
            key: _bytes(count, rows, columns // 2),
            f"{key}_weight_scale": _fp8(count, rows, columns // 16),
            f"{key}_weight_scale_2": torch.rand(count),
        }

    return _stacks(tensors, packed)


def stacked_fp8(tensors: Parts, _: Pack) -> Parts:
    def packed(key: str, tensor: Tensor) -> Parts:
        scale = torch.rand(len(tensor), 1, 1) / 100
        return {key: tensor.to(torch.float8_e4m3fn), f"{key}_scale_inv": scale}

    return _stacks(tensors, packed)


def stacked_mxfp4(tensors: Parts, _: Pack) -> Parts:
    """As gpt-oss is published: [E, out, in / 32, 16] bytes and their exponents."""

    def packed(key: str, tensor: Tensor) -> Parts:
        count, columns, rows = tensor.shape
        exponents = torch.randint(121, 125, (count, rows, columns // 32))
        blocks = _bytes(count, rows, columns // 32, 16)
        return {f"{key}_blocks": blocks, f"{key}_scales": exponents.to(torch.uint8)}

    return _stacks(tensors, packed)


def _stacks(tensors: Parts, packed: Callable[[str, Tensor], Parts]) -> Parts:
    """The tensors with other ones for each stack of experts."""
    made: Parts = {}
    for key, tensor in tensors.items():
        made |= {key: tensor} if _STACKED.match(key) is None else packed(key, tensor)
    return made


# -- all of them -----------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
INT4 = packing.KIMI
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
AUTO_ROUND = {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
BNB_4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BNB_8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
TORCHAO = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def _compressed(stored: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INT8 = _compressed("int-quantized", type="int", num_bits=8, strategy="channel")
CT_FP8 = _compressed("float-quantized", type="float", num_bits=8, strategy="channel")
CT_NVFP4 = _compressed("nvfp4-pack-quantized", type="float", num_bits=4, group_size=16)

EACH, ROUTERS, STACK = "each expert by itself", "routers too", "experts stacked"
FORMATS = [
    Format("bfloat16", EACH, None),
    Format("float16", EACH, None, dtype=torch.float16),
    Format("float32", EACH, None, dtype=torch.float32),
    Format("bfloat16", STACK, None, model="qwen3_vl_moe"),
    Format("FP8 blocks", EACH, FP8, fp8_blocks),
    Format("MXFP4 (gpt-oss)", STACK, {"quant_method": "mxfp4"}, model="gpt_oss",
           change=stacked_mxfp4),
    Format("compressed-tensors INT4", EACH, INT4, packed_int4),
    Format("compressed-tensors INT8", EACH, INT8, plain_int8),
    Format("compressed-tensors FP8", EACH, CT_FP8, plain_fp8),
    Format("compressed-tensors NVFP4", EACH, CT_NVFP4, nvfp4_compressed),
    Format("GPTQ", EACH, GPTQ, gptq),
    Format("GPTQ", ROUTERS, GPTQ, gptq, routers=True),
    Format("GPTQ v2", EACH, {**GPTQ, "checkpoint_format": "gptq_v2"}, gptq),
    Format("GPTQ for Marlin", EACH, {**GPTQ, "checkpoint_format": "marlin"}, gptq),
    Format("GPTQ without settings", EACH, None, gptq),
    Format("AWQ", EACH, AWQ, awq),
    Format("AWQ", ROUTERS, AWQ, awq, routers=True),
    Format("AWQ GEMV", EACH, {**AWQ, "version": "gemv"}, awq),
    Format("AutoRound", EACH, AUTO_ROUND, gptq),
    Format("AutoRound AWQ", EACH, {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}, awq),
    Format("bitsandbytes 4-bit", EACH, BNB_4, bnb_4bit),
    Format("bitsandbytes 4-bit", ROUTERS, BNB_4, bnb_4bit, routers=True),
    Format("bitsandbytes 8-bit", EACH, BNB_8, bnb_8bit),
    Format("HQQ", EACH, {"quant_method": "hqq"}, hqq),
    Format("EETQ", EACH, {"quant_method": "eetq", "weights": "int8"}, eetq),
    Format("quanto", EACH, {"quant_method": "quanto", "weights": "int8"}, quanto),
    Format("torchao", EACH, TORCHAO, torchao, describe=values.torchao_metadata),
    Format("torchao packed for a kernel", EACH, TORCHAO, torchao,
           describe=partial(values.torchao_metadata, kind="Int4TilePackedTo4dTensor")),
    Format("ModelOpt FP8", EACH, {"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_modelopt),
    Format("ModelOpt NVFP4", EACH, MODELOPT, nvfp4),
    Format("ModelOpt NVFP4 without settings", EACH, None, nvfp4),
    Format("ModelOpt NVFP4", STACK, MODELOPT, model="qwen3_vl_moe", change=stacked_nvfp4),
    Format("ModelOpt NVFP4", "a list a projection", MODELOPT, nvfp4, model="qwen3_vl_moe",
           change=by_projection),
    Format("FP8 without quantization_config", EACH, None, fp8_blocks),
    Format("FP8", STACK, FP8, model="qwen3_vl_moe", change=stacked_fp8),
    *(
        Format("FP8 blocks", f"each expert by itself where transformers stacks ({model})", FP8,
               fp8_blocks, model=model, change=by_expert)
        for model in ("qwen3_vl_moe", "llama4", "gemma4", "gpt_oss")
    ),
]  # fmt: skip
