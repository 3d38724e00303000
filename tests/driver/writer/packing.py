"""Reference packings of GPTQ, AWQ and compressed-tensors, written from their definitions, and a cut
of one matrix as the writer makes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reap_driver.files.quantization import Quantization
from reap_driver.files.safetensors_file import read_header
from reap_driver.model.expert_layout import ExpertDim
from reap_driver.writer import layouts
from reap_driver.writer.layouts import Matrix, Stored
from reap_driver.writer.shards import OutShard, out_tensor
from reap_driver.writer.stream import write_shard
from tests.driver.writer import saved

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ = {"quant_method": "gptq", "bits": 4}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def pack(codes: Tensor, bits: int) -> Tensor:
    """[rows, n] codes to [rows, words] of 32 bits: code i of a row begins at bit i * bits."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([whole >> (32 * w) & 0xFFFFFFFF for w in range(words)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` packed; what is behind the last code must be zero."""
    rows = []
    for row in words.tolist():
        whole = sum((word & 0xFFFFFFFF) << (32 * w) for w, word in enumerate(row))
        assert whole >> (bits * count) == 0
        rows.append([whole >> (bits * i) & (1 << bits) - 1 for i in range(count)])
    return torch.tensor(rows)


def interleave(codes: Tensor) -> Tensor:
    """[rows, n] codes in the order in which AWQ fills its words."""
    return codes.view(len(codes), -1, 8)[:, :, list(AWQ_ORDER)].reshape(codes.shape)


def straighten(codes: Tensor) -> Tensor:
    """The inverse of `interleave`."""
    found = torch.empty_like(codes).view(len(codes), -1, 8)
    found[:, :, list(AWQ_ORDER)] = codes.view(len(codes), -1, 8)
    return found.view(codes.shape)


@dataclass(frozen=True)
class Codes:
    """A quantized matrix: weight[o, i] is scales[g, o] * (codes[o, i] - zeros[g, o])."""

    codes: Tensor  # [out, in]
    zeros: Tensor  # [groups, out]
    scales: Tensor  # [groups, out]
    order: Tensor  # [in], the group of every input

    @classmethod
    def random(cls, rows: int, columns: int, bits: int, group: int) -> "Codes":
        generator = torch.Generator().manual_seed(rows + columns + bits)
        groups = columns // group
        return cls(
            torch.randint(1 << bits, (rows, columns), generator=generator),
            torch.randint(1 << bits, (groups, rows), generator=generator),
            torch.rand(groups, rows, generator=generator).half(),
            torch.arange(columns, dtype=torch.int32)[torch.randperm(columns)] // group,
        )

    def gptq(self, bits: int) -> dict[str, Tensor]:
        return {
            "qweight": pack(self.codes, bits).T.contiguous(),
            "qzeros": pack(self.zeros, bits),
            "scales": self.scales,
            "g_idx": self.order,
        }

    def awq(self) -> dict[str, Tensor]:
        return {
            "qweight": pack(interleave(self.codes.T), 4),
            "qzeros": pack(interleave(self.zeros), 4),
            "scales": self.scales,
        }

    def compressed(self, bits: int) -> dict[str, Tensor]:
        return {
            "weight_packed": pack(self.codes, bits),
            "weight_zero_point": pack(self.zeros, bits).T.contiguous(),
            "weight_scale": self.scales.T.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape),
            "weight_g_idx": self.order,
        }

    def check_gptq(self, found: Mapping[str, Tensor], bits: int, kept: list[int]) -> None:
        codes, zeros = unpack(found["qweight"].T, bits, self.codes.shape[1]), found["qzeros"]
        assert torch.equal(codes, self.codes[kept])
        assert torch.equal(unpack(zeros, bits, len(kept)), self.zeros[:, kept])
        assert torch.equal(found["scales"], self.scales[:, kept])
        assert torch.equal(found["g_idx"], self.order)

    def check_awq(self, found: Mapping[str, Tensor], kept: list[int]) -> None:
        codes = straighten(unpack(found["qweight"], 4, len(kept)))
        assert torch.equal(codes.T, self.codes[kept])
        assert torch.equal(straighten(unpack(found["qzeros"], 4, len(kept))), self.zeros[:, kept])
        assert torch.equal(found["scales"], self.scales[:, kept])

    def check_compressed(self, found: Mapping[str, Tensor], bits: int, kept: list[int]) -> None:
        columns = self.codes.shape[1]
        assert torch.equal(unpack(found["weight_packed"], bits, columns), self.codes[kept])
        zeros = unpack(found["weight_zero_point"].T, bits, len(kept))
        assert torch.equal(zeros, self.zeros[:, kept])
        assert torch.equal(found["weight_scale"], self.scales.T[kept])
        assert found["weight_shape"].tolist() == [len(kept), columns]
        assert torch.equal(found["weight_g_idx"], self.order)


def cut(
    folder: Path,
    tensors: dict[str, Tensor],
    matrix: Matrix,
    kept: list[int],
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """Write the tensors of one matrix, cut them as the writer does, read what it wrote."""
    folder.mkdir(exist_ok=True)
    save_file({f"gate.{leaf}": tensor for leaf, tensor in tensors.items()}, folder / "in")
    entries = read_header(folder / "in").tensors
    method = Quantization(settings.get("quant_method"), settings)
    out = []
    for key, entry in entries.items():
        stored = Stored(key, entry, key[5:], lambda leaf: entries.get(f"gate.{leaf}"))
        made = out_tensor(key, entry, layouts.cut(stored, matrix, tuple(kept), method))
        assert made is not None
        out.append(made)
    (folder / "out").unlink(missing_ok=True)
    write_shard(folder, OutShard("out", out), lambda _: None)
    return {key[5:]: tensor for key, tensor in saved.read_all_of(folder / "out").items()}


def router(experts: int, columns: int, tail: int = 0) -> Matrix:
    dim = ExpertDim("layer", 0, 1, tail, experts)
    return Matrix("gate.weight", (experts + tail, columns), dim)


def some(experts: int, keep: int) -> list[int]:
    return sorted(
        torch.randperm(experts, generator=torch.Generator().manual_seed(3))[:keep].tolist()
    )
