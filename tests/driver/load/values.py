"""Matrices as quantizers of 4 and 8 bits store them, and what they stand for by the definitions.

Every value is computed by itself, from the bits of its codes, in numpy's float32.
"""

import json

import numpy as np
import torch
from torch import Tensor

Parts = dict[str, Tensor]
F32 = np.float32


def e2m1(code: int) -> float:
    """A 4-bit float: sign, two bits of exponent, one of fraction."""
    exponent, fraction = code >> 1 & 3, code & 1
    size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2 ** (exponent - 1)
    return -size if code & 8 else size


def e4m3(code: int) -> float:
    """An 8-bit float: sign, four bits of exponent, three of fraction."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if code & 128 else size


def nvfp4(rows: int, columns: int, *, compressed: bool, seed: int = 0) -> tuple[Parts, Tensor]:
    """A matrix of NVFP4 as compressed-tensors or ModelOpt stores it, and its values."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    scales = rng.integers(1, 126, (rows, columns // 16), dtype=np.uint8)
    whole = F32(rng.uniform(300, 3000)) if compressed else F32(rng.uniform(0.0003, 0.003))
    value = np.empty((rows, columns), dtype=F32)
    for row in range(rows):
        for column in range(columns):
            byte, scale = int(codes[row, column // 2]), F32(e4m3(int(scales[row, column // 16])))
            scale = scale / whole if compressed else scale * whole
            value[row, column] = F32(e2m1(byte >> 4 if column % 2 else byte & 15)) * scale
    stored = torch.from_numpy(scales).view(torch.float8_e4m3fn)
    if compressed:
        parts = {"weight_packed": torch.from_numpy(codes), "weight_scale": stored}
        parts["weight_global_scale"] = torch.tensor([whole])
        return parts, torch.from_numpy(value).bfloat16()
    parts = {"weight": torch.from_numpy(codes), "weight_scale": stored}
    return {**parts, "weight_scale_2": torch.tensor(whole)}, torch.from_numpy(value)


def blocks(
    rows: int,
    columns: int,
    *,
    kind: str = "nf4",
    size: int = 64,
    nested: bool = False,
    dtype: str = "bfloat16",
    storage: torch.dtype = torch.uint8,
    seed: int = 0,
) -> tuple[Parts, Tensor]:
    """A matrix of 4-bit codes as bitsandbytes stores it, and its values."""
    rng = np.random.default_rng(seed)
    count = rows * columns
    total, inner = -(-count // size), 256
    codes = rng.integers(0, 256, (-(-count // 2),), dtype=np.uint8)
    table = np.sort(rng.uniform(-1, 1, 16)).astype(F32)
    state: dict[str, object] = {"quant_type": kind, "blocksize": size, "dtype": dtype}
    state["shape"] = [rows, columns]
    scales = rng.uniform(0.01, 0.1, total).astype(F32)
    parts = {"weight.absmax": torch.from_numpy(scales)}
    if nested:
        bytes_ = rng.integers(0, 256, total, dtype=np.uint8)
        inner_table = np.sort(rng.uniform(-1, 1, 256)).astype(F32)
        inner_scales = rng.uniform(0.01, 0.02, -(-total // inner)).astype(F32)
        offset = 0.0523
        state |= {"nested_blocksize": inner, "nested_offset": offset, "nested_dtype": "float32"}
        scales = np.array(
            [
                F32(F32(inner_table[b] * inner_scales[n // inner]) + F32(offset))
                for n, b in enumerate(bytes_)
            ],
            dtype=F32,
        )
        parts = {
            "weight.absmax": torch.from_numpy(bytes_),
            "weight.nested_absmax": torch.from_numpy(inner_scales),
            "weight.nested_quant_map": torch.from_numpy(inner_table),
        }
    value = np.empty(count, dtype=F32)
    for place in range(count):
        byte = int(codes[place // 2])
        value[place] = table[byte & 15 if place % 2 else byte >> 4] * scales[place // size]
    parts |= {
        "weight": torch.from_numpy(codes).view(storage)[:, None],
        "weight.quant_map": torch.from_numpy(table),
        f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(
            list(json.dumps(state).encode())
        ).byte(),
    }
    return parts, torch.from_numpy(value).view(rows, columns).to(getattr(torch, dtype))


def rows_of_bytes(rows: int, columns: int, *, seed: int = 0) -> tuple[Parts, Tensor]:
    """A matrix of 8-bit integers as bitsandbytes stores it, and its values."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    scales = rng.uniform(0.1, 1, rows).astype(F32)
    value = np.empty((rows, columns), dtype=F32)
    for row in range(rows):
        for column in range(columns):
            value[row, column] = F32(F32(codes[row, column]) * scales[row]) * F32(1 / 127)
    parts = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(scales)}
    parts["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return parts, torch.from_numpy(value)


def scaled(
    rows: int,
    columns: int,
    *,
    kind: str = "Int8Tensor",
    group: int | None = None,
    dtype: str = "bfloat16",
    scales: torch.dtype = torch.float32,
    zeros: bool = True,
    seed: int = 0,
) -> tuple[Parts, Tensor]:
    """A matrix of one of torchao's classes, and its values; `torchao_metadata` describes it."""
    rng = np.random.default_rng(seed)
    wide = group or columns
    factors = torch.from_numpy(rng.uniform(0.001, 0.01, (rows, columns // wide))).to(scales)
    points = rng.integers(-8, 8, factors.shape).astype(np.int8)
    if kind == "Float8Tensor":
        bits = rng.integers(0, 127, (rows, columns), dtype=np.uint8)
        codes = torch.from_numpy(bits).view(torch.float8_e4m3fn)
        numbers, zeros = [[e4m3(int(code)) for code in row] for row in bits], False
    else:
        codes = torch.from_numpy(rng.integers(-128, 128, (rows, columns)).astype(np.int8))
        numbers = codes.tolist()
    value = np.empty((rows, columns), dtype=F32)
    for row in range(rows):
        for column in range(columns):
            place = row, column // wide
            point = int(points[place]) if zeros else 0
            value[row, column] = F32(numbers[row][column] - point) * F32(factors[place].item())
    parts = {"_weight_qdata": codes, "_weight_scale": factors}
    if zeros:
        parts["_weight_zero_point"] = torch.from_numpy(points)
    return parts, torch.from_numpy(value).to(getattr(torch, dtype))


def torchao_metadata(
    tensors: Parts, kind: str = "Int8Tensor", dtype: str = "bfloat16"
) -> dict[str, str]:
    """What torchao writes into the metadata of a file with these tensors."""
    said = {}
    for key, codes in tensors.items():
        module, found, _ = key.partition("_weight_qdata")
        if found:
            rows, columns = codes.shape
            scale = tensors[f"{module}_weight_scale"].shape
            leaves = ("qdata", "scale", "zero_point")
            entry = {
                "_type": kind,
                "_data": {
                    "block_size": [rows // scale[0], columns // scale[1]],
                    "dtype": {"_type": "torch.dtype", "_data": dtype},
                },
                "_tensor_data_names": [
                    leaf for leaf in leaves if f"{module}_weight_{leaf}" in tensors
                ],
            }
            said[f"{module}weight"] = json.dumps(entry)
    return {**said, "tensor_names": json.dumps(list(said))}
