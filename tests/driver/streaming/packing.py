"""Matrices and checkpoints as compressed-tensors stores them, by the formats' definitions.

The definitions are arithmetic on numpy's integers. `make test-interop` compares every case with
that library; checked once, transformers 5.18.0 with compressed-tensors 0.20.0 makes the same
tensors of the INT4 models.

`KIMI` is the `quantization_config` of Kimi-K2-Thinking as a public builder of tiny Kimi-K2
checkpoints copied it, with the names of the vision tower that vLLM's tests have in the `ignore` of
Kimi-K2.6; Kimi-K2.5 and its successors have it in `text_config`.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.driver.published.reduce import VOCAB
from tests.driver.writer import saved

Parts = dict[str, Tensor]
CPU = torch.device("cpu")

KIMI: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        "re:.*vision_tower.*",
        "re:.*mm_projector.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


# -- the formats, by their definitions -------------------------------------------------------------


def words(codes: np.ndarray, bits: int) -> Tensor:
    """Integers of rows in words of 32 bits, the lowest bits first, half their range added."""
    each = 32 // bits
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // each) * each), dtype=np.uint64)
    padded[:, : codes.shape[1]] = codes + (1 << (bits - 1))
    shifts = np.arange(each, dtype=np.uint64) * np.uint64(bits)
    packed = (padded.reshape(codes.shape[0], -1, each) << shifts).sum(-1, dtype=np.uint64)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def spread(values: np.ndarray, rows: int, columns: int, block: tuple[int, int]) -> np.ndarray:
    """The value of an element's block, for each element."""
    row, column = np.arange(rows) // block[0], np.arange(columns) // block[1]
    return values[row[:, None], column[None, :]]


def scales(shape: tuple[int, int], dtype: torch.dtype, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.uniform(0.002, 0.02, shape)).to(dtype)


def product(codes: np.ndarray, factors: Tensor, block: tuple[int, int]) -> Tensor:
    """code x scale in float32, rounded once to the scales' dtype."""
    of_each = spread(factors.float().numpy(), *codes.shape, block)
    return torch.from_numpy(codes.astype(np.float32) * of_each).to(factors.dtype)


def integers(
    rows: int,
    columns: int,
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group: int | None = 32,
    dtype: torch.dtype = BF16,
    zeros: bool = False,
    packed: bool = True,
) -> tuple[Parts, Tensor]:
    """A random matrix of integers: its parts on disk, and what they stand for."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = rng.integers(low, high, (rows, columns))
    wide = group or columns
    factors = scales((rows, columns // wide), dtype, rng)
    parts = {"weight_scale": factors}
    if packed:
        parts["weight_packed"] = words(codes, bits)
        parts["weight_shape"] = torch.tensor([rows, columns])
    else:
        parts["weight"] = torch.from_numpy(codes.astype(np.int8))
    if zeros:
        points = rng.integers(low, high, factors.shape)
        byte = torch.from_numpy(points.astype(np.int8))
        parts["weight_zero_point"] = words(points.T, bits).T.contiguous() if packed else byte
        codes = codes - spread(points, rows, columns, (1, wide))
    return parts, product(codes, factors, (1, wide))


def floats(
    rows: int,
    columns: int,
    rng: np.random.Generator,
    *,
    block: tuple[int, int] | None = None,
    rowwise: bool = False,
    flat: bool = False,
    dtype: torch.dtype = BF16,
) -> tuple[Parts, Tensor]:
    """A random matrix of 8-bit floats with one scale, one per row, or one per block."""
    weight = torch.from_numpy(rng.normal(0, 100, (rows, columns))).to(torch.float8_e4m3fn)
    high, wide = block or (1 if rowwise else rows, columns)
    factors = scales((-(-rows // high), -(-columns // wide)), dtype, rng)
    value = product(weight.float().numpy(), factors, (high, wide))
    return {"weight": weight, "weight_scale": factors.view(-1) if flat else factors}, value


def config(
    bits: int = 4,
    group: int | None = 32,
    strategy: str = "group",
    form: str = "pack-quantized",
    **fields: Any,
) -> dict[str, Any]:
    """`KIMI` with other weights."""
    made = copy.deepcopy(KIMI)
    made["format"] = form
    weights = made["config_groups"]["group_0"]["weights"]
    weights.update({"num_bits": bits, "group_size": group, "strategy": strategy, **fields})
    return made


ASYMMETRIC = {"symmetric": False}
FLOAT = {"type": "float", "form": "float-quantized"}
INT8 = {"bits": 8, "group": None, "strategy": "channel"}
Make = Callable[[int, int, np.random.Generator], tuple[Parts, Tensor]]
CASES: dict[str, tuple[dict[str, Any], Make]] = {
    "int4": (config(), integers),
    "int4 in groups of 16": (config(group=16), partial(integers, group=16)),
    "int4 in groups of 4": (config(group=4), partial(integers, group=4)),
    "int4 by rows": (config(group=None, strategy="channel"), partial(integers, group=None)),
    "int4 float16": (config(), partial(integers, dtype=F16)),
    "int4 float32": (config(), partial(integers, dtype=F32)),
    "int4 static order": (config(actorder="static"), integers),
    "int4 zeros": (config(**ASYMMETRIC), partial(integers, zeros=True)),
    "int8 packed": (config(bits=8), partial(integers, bits=8)),
    "int8 packed zeros": (
        config(bits=8, **ASYMMETRIC),
        partial(integers, bits=8, zeros=True, dtype=F32),
    ),
    "int8": (
        config(**INT8, form="int-quantized"),
        partial(integers, bits=8, group=None, packed=False),
    ),
    "int8 zeros": (
        config(**INT8, form="naive-quantized", **ASYMMETRIC),
        partial(integers, bits=8, group=None, packed=False, zeros=True),
    ),
    "fp8 by rows": (config(8, None, "channel", **FLOAT), partial(floats, rowwise=True)),
    "fp8 by rows, flat": (
        config(8, None, "channel", **FLOAT),
        partial(floats, rowwise=True, flat=True, dtype=F32),
    ),
    "fp8 one scale": (config(8, None, "tensor", **FLOAT), partial(floats, flat=True)),
    "fp8 blocks": (
        config(8, None, "block", block_structure=[32, 20], **FLOAT),
        partial(floats, block=(32, 20), dtype=F32),
    ),
}


def two_groups(**weights: Any) -> dict[str, Any]:
    """`KIMI` and a second group, each with its own format."""
    first, second = config(), config(**weights)
    groups = {
        f"group_{number}": {**made["config_groups"]["group_0"], "format": made["format"]}
        for number, made in enumerate((first, second))
    }
    return {**KIMI, "config_groups": groups, "format": "mixed-precision"}


# -- models ----------------------------------------------------------------------------------------

ROUTED = r"\.mlp\.experts\.\d+\.\w+_proj\.weight$"
LINEAR = r"_proj\.weight$|_proj_with_mqa\.weight$"
FIELDS = {"hidden_size": 64, "moe_intermediate_size": 32, "vocab_size": VOCAB}


def checkpoints(
    name: str,
    folder: Path,
    quantize: dict[str, str],
    quantization: dict[str, Any],
    cases: Mapping[str, tuple[dict[str, Any], Make]] = CASES,
) -> tuple[Path, Path]:
    """A model's checkpoint in published layout, and one with the same weights unquantized.

    `quantize`: regular expression of keys -> their case, one of `cases`.
    """
    stored_in, plain_in = folder / "stored", folder / "plain"
    rng = np.random.default_rng(3)
    values: Parts = {}

    def change(tensors: Parts) -> Parts:
        out: Parts = {}
        for key, tensor in tensors.items():
            case = next((case for p, case in quantize.items() if re.search(p, key)), None)
            if case is None:
                out[key] = values[key] = tensor.to(BF16)
                continue
            parts, value = cases[case][1](*tensor.shape, rng)
            module = key.removesuffix("weight")
            out |= {module + leaf: part.contiguous() for leaf, part in parts.items()}
            values[key] = value
        return out

    saved.save(name, stored_in, **FIELDS)
    saved.change_config(stored_in, dtype="bfloat16")
    shutil.copytree(stored_in, plain_in)
    saved.change_tensors(stored_in, change)
    saved.change_tensors(plain_in, lambda _: values)
    said: dict[str, Any] = {"quantization_config": quantization}
    text = json.loads((stored_in / "config.json").read_text()).get("text_config")
    saved.change_config(stored_in, **({"text_config": {**text, **said}} if text else said))
    for path in (stored_in, plain_in):
        saved.shard(path, 3)
    return stored_in, plain_in
