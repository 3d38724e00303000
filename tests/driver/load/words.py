"""Matrices as GPTQ, AWQ and AutoRound store them, by the formats' definitions.

The definitions are arithmetic on Python's integers, bit by bit. `tests/interop` compares the same
variants with the libraries.
"""

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tests.driver.streaming.packing import BF16, F16, F32, Make, Parts
from tests.driver.writer.packing import interleave, pack

Zeros = Literal["z", "z - 1", "words - 1"]


def matrix(
    rows: int,
    columns: int,
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group: int | None = 16,
    awq: bool = False,
    zeros: Zeros = "z",
    symmetric: bool = False,
    order: bool | None = None,
    dtype: torch.dtype = F16,
) -> tuple[Parts, Tensor]:
    """A random matrix: its parts on disk, and what they stand for.

    Args:
        rows, columns: outputs and inputs.
        rng: of its values.
        bits: per code.
        group: inputs that share a scale; None for all.
        awq: whether codes are packed as AWQ does it, rather than GPTQ.
        zeros: how zero points are stored.
        symmetric: whether every zero point is half the range.
        order: whether a `g_idx` permutes inputs; None for no `g_idx`.
        dtype: of the scales.
    """
    wide, most = group or columns, 1 << bits
    groups = -(-columns // wide)
    codes = rng.integers(0, most, (rows, columns))
    low = 1 if zeros == "z - 1" else 0
    points = rng.integers(low, most + low, (groups, rows))
    if symmetric:
        points[:] = most // 2
    scales = torch.from_numpy(rng.uniform(0.002, 0.02, (groups, rows))).to(dtype)
    of_input = np.arange(columns) // wide
    if order:
        of_input = rng.permutation(of_input)
    parts: Parts = {"scales": scales, "qzeros": _zero_words(points, bits, zeros)}
    if awq:
        parts["qweight"] = pack(interleave(torch.from_numpy(codes.T.copy())), bits)
        parts["qzeros"] = pack(interleave(torch.from_numpy(points)), bits)
    else:
        parts["qweight"] = pack(torch.from_numpy(codes), bits).T.contiguous()
    if order is not None:
        parts["g_idx"] = torch.from_numpy(of_input.astype(np.int32))
    whole = (codes - points.T[:, of_input]).astype(np.float32)
    return parts, torch.from_numpy(whole * scales.float().numpy().T[:, of_input]).to(dtype)


def _zero_words(points: np.ndarray, bits: int, zeros: Zeros) -> Tensor:
    if zeros == "z":
        return pack(torch.from_numpy(points), bits)
    if zeros == "z - 1" or bits == 3:
        return pack(torch.from_numpy((points - 1) % (1 << bits)), bits)
    ones = sum(1 << place for place in range(0, 32, bits))
    words = pack(torch.from_numpy(points), bits).numpy().astype(np.int64)
    return torch.from_numpy(((words - ones) % (1 << 32)).astype(np.uint32).view(np.int32))


def gptq(bits: int = 4, group: int = 16, **fields: Any) -> dict[str, Any]:
    """Settings as GPTQModel writes them."""
    meta = {"quantizer": ["gptqmodel:7.7.0"]}
    found = {"bits": bits, "group_size": group, "desc_act": False, "sym": True, "meta": meta}
    return {"quant_method": "gptq", "checkpoint_format": "gptq", **found, **fields}


def awq(**fields: Any) -> dict[str, Any]:
    """Settings as AutoAWQ writes them."""
    found = {"bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    return {"quant_method": "awq", **found, **fields}


def auto_round(bits: int = 4, packing: str = "auto_round:auto_gptq", **f: Any) -> dict[str, Any]:
    """Settings as AutoRound writes them."""
    found = {"bits": bits, "group_size": 16, "sym": True, "data_type": "int"}
    return {"quant_method": "auto-round", "packing_format": packing, **found, **f}


V2: dict[str, Any] = {"checkpoint_format": "gptq_v2"}
WORDS: Zeros = "words - 1"
LESS: Zeros = "z - 1"
CASES: dict[str, tuple[dict[str, Any], Make]] = {
    "gptq": (gptq(), partial(matrix, zeros=WORDS, symmetric=True, order=False)),
    "gptq float32": (gptq(), partial(matrix, zeros=WORDS, symmetric=True, dtype=F32)),
    "gptq bfloat16": (gptq(), partial(matrix, zeros=WORDS, symmetric=True, dtype=BF16)),
    "gptq act-order": (
        gptq(desc_act=True),
        partial(matrix, zeros=WORDS, symmetric=True, order=True),
    ),
    "gptq whole rows": (gptq(group=-1), partial(matrix, zeros=WORDS, symmetric=True, group=None)),
    "gptq partial group": (
        gptq(group=40),
        partial(matrix, zeros=WORDS, symmetric=True, group=40, order=False),
    ),
    "gptq by AutoRound": (
        gptq(sym=False, provider="auto-round"),
        partial(matrix, zeros=LESS, order=False),
    ),
    "awq": (awq(), partial(matrix, awq=True)),
    "awq as first named": (
        {"w_bit": 4, "q_group_size": 16, "version": "GEMM", "zero_point": True},
        partial(matrix, awq=True),
    ),
    "auto-round awq": (auto_round(packing="auto_round:auto_awq"), partial(matrix, awq=True)),
    "auto-round before 0.4": (
        auto_round(packing="", backend="auto_round:gptq:exllamav2"),
        partial(matrix, zeros=LESS),
    ),
    "auto-round with g_idx": (
        auto_round(packing="auto_round:gptqmodel", sym=False),
        partial(matrix, order=False),
    ),
}
for _bits in (2, 3, 4, 8):
    CASES[f"gptq {_bits} bits, asymmetric"] = (
        gptq(_bits, sym=False),
        partial(matrix, bits=_bits, zeros=WORDS, order=False),
    )
    CASES[f"gptq_v2 {_bits} bits, act-order"] = (
        gptq(_bits, sym=False, desc_act=True, **V2),
        partial(matrix, bits=_bits, order=True),
    )
for _bits in range(2, 9):
    CASES[f"auto-round {_bits} bits"] = (
        auto_round(_bits),
        partial(matrix, bits=_bits, zeros=LESS, symmetric=True),
    )
    CASES[f"auto-round {_bits} bits, asymmetric"] = (
        auto_round(_bits, "auto_round", sym=False),
        partial(matrix, bits=_bits),
    )
