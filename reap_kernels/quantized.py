"""Quantized matrices of a layer's experts, as checkpoints store them, and what their codes mean.

The definitions are written here once, in plain torch operations; kernels are checked against them.
Nothing waits for the device, and tables on it are computed, not copied there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from reap_kernels.errors import DtypeError, ShapeError

# Elements of K that one element of `values` holds, and the dtypes of values and scales.
FORMATS: dict[str, tuple[int, torch.dtype, tuple[torch.dtype, ...]]] = {
    "fp8_block": (1, torch.float8_e4m3fn, (torch.float32, torch.bfloat16)),
    "mxfp4": (2, torch.uint8, (torch.uint8,)),
    "int4_group": (8, torch.int32, (torch.bfloat16, torch.float16, torch.float32)),
}
# Elements that share a scale in MXFP4.
MX_BLOCK = 32


@dataclass(frozen=True, eq=False)
class Quantized(Sequence[Tensor]):
    """E matrices [N, K] in one quantized format: a sequence of bf16 matrices, each computed when
    it is asked for. `dequantize` makes all of them, or those that have rows, at once.

    Formats; value is the product in float32, rounded once to bf16:

    - `fp8_block`: values [E, N, K] float8_e4m3fn; scales [E, ceil(N / rows), ceil(K / columns)]
      float32 or bf16, one per block of `block` = (rows, columns); the last blocks may be partial.
      value = float(w) * scale, as DeepSeek-V3 (`weight_scale_inv`) and transformers'
      integrations/finegrained_fp8.py have it.
    - `mxfp4`: values [E, N, K / 2] uint8, the low nibble first, codes E2M1 (0, 0.5, 1, 1.5, 2, 3,
      4, 6 and their negatives); scales [E, N, K / 32] uint8, E8M0: 2^(s - 127), 255 is NaN (OCP
      Microscaling Formats 1.0; codes and order as in transformers' integrations/mxfp4.py). The
      `blocks` of gpt-oss are [E, N, K / 32, 16]: pass `blocks.flatten(2)`.
    - `int4_group`: values [E, N, K / 8] int32, whose nibble i from below is element 8 w + i, stored
      plus 8; scales [E, N, K / g] bf16, fp16 or float32, one per group of g elements, a multiple of
      8. value = q * scale (compressed-tensors' `pack-quantized`, symmetric, 4 bits). K must be a
      whole number of words, and no group permutation (`actorder`) applied.

    Attributes:
        values: the codes, contiguous.
        scales: contiguous, on the same device.
        format: one of `FORMATS`.
        block: rows and columns of a block of `fp8_block`, powers of two; other formats ignore it.

    Raises:
        ShapeError: shapes do not fit the format and each other, or a tensor is not contiguous.
        DtypeError: an unknown format, a dtype that is not its own, or different devices.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> values = torch.ones(2, 8, 16).to(torch.float8_e4m3fn)
        >>> matrices = rk.Quantized(values, torch.full((2, 1, 1), 0.5), "fp8_block")
        >>> matrices.shape
        (2, 8, 16)
        >>> float(matrices[1][0, 0])
        0.5
    """

    values: Tensor
    scales: Tensor
    format: str
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        self._check_tensors()
        experts, rows, columns = self.shape
        if self.format == "int4_group":
            self._check_groups()
        elif self.format == "mxfp4" and columns % MX_BLOCK:
            raise ShapeError(
                f"Quantized.values is {tuple(self.values.shape)}, so K = {columns}; mxfp4 needs a "
                f"multiple of {MX_BLOCK}"
            )
        if any(size < 1 or size & (size - 1) for size in self.block) or len(self.block) != 2:
            raise ShapeError(
                f"Quantized.block is {self.block}; give two powers of two, such as (128, 128)"
            )
        if min(rows, columns) < 1:
            raise ShapeError(f"Quantized.values is {tuple(self.values.shape)}: matrices are empty")
        high, wide = self.scale_block
        want = (experts, -(-rows // high), -(-columns // wide))
        if tuple(self.scales.shape) != want:
            raise ShapeError(
                f"Quantized.scales is {tuple(self.scales.shape)}; {self.format} values "
                f"{tuple(self.values.shape)} with a scale for {high} x {wide} elements need {want}"
            )

    def _check_tensors(self) -> None:
        """Raises unless both tensors are what the format stores, wherever they lie."""
        if self.format not in FORMATS:
            raise DtypeError(
                f"Quantized.format {self.format!r} is not known; choose one of {', '.join(FORMATS)}"
            )
        _, stored, scaled = FORMATS[self.format]
        for name, tensor, allowed in (
            ("values", self.values, (stored,)),
            ("scales", self.scales, scaled),
        ):
            if tensor.dtype not in allowed:
                raise DtypeError(
                    f"Quantized.{name} is {tensor.dtype}; {self.format} has "
                    f"{' or '.join(map(str, allowed))}"
                )
            if tensor.ndim != 3:
                raise ShapeError(
                    f"Quantized.{name} has shape {tuple(tensor.shape)}; give [E, ...] of three "
                    "dimensions (the blocks of gpt-oss: blocks.flatten(2))"
                )
            if not tensor.is_contiguous():
                raise ShapeError(
                    f"Quantized.{name} has strides {tensor.stride()} for shape "
                    f"{tuple(tensor.shape)}; pass {name}.contiguous()"
                )
        if self.values.device != self.scales.device:
            raise DtypeError(
                f"Quantized.values is on {self.values.device} and scales on {self.scales.device}; "
                "move one"
            )

    def _check_groups(self) -> None:
        columns, groups = self.shape[2], self.scales.shape[2]
        if groups < 1 or columns % groups or columns // groups % 8:
            raise ShapeError(
                f"Quantized.scales has {groups} groups per row of K = {columns} elements; groups "
                "must be equal and of a multiple of 8 elements"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, rows, stored = self.values.shape
        return experts, rows, stored * FORMATS[self.format][0]

    @property
    def scale_block(self) -> tuple[int, int]:
        """Rows and columns of the elements that share a scale."""
        if self.format == "fp8_block":
            return self.block
        if self.format == "mxfp4":
            return 1, MX_BLOCK
        return 1, self.shape[2] // self.scales.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """bf16, which every matrix is made in."""
        return torch.bfloat16

    @property
    def device(self) -> torch.device:
        """The device the codes lie on, and the matrices are made on."""
        return self.values.device

    def part(self, first: int, last: int) -> "Quantized":
        """Experts first to last - 1, as views."""
        return Quantized(self.values[first:last], self.scales[first:last], self.format, self.block)

    def to(self, device: torch.device | str) -> "Quantized":
        """The same on `device`."""
        return Quantized(self.values.to(device), self.scales.to(device), self.format, self.block)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Values and scales."""
        return self.values, self.scales

    def __len__(self) -> int:
        return self.values.shape[0]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """[N, K] bf16 of one expert, or of several."""
        if isinstance(index, slice):
            return [self[expert] for expert in range(*index.indices(len(self)))]
        values, scales = self.values[index], self.scales[index]
        if self.format == "mxfp4":
            codes, factors = _e2m1(values), _e8m0(scales)
        elif self.format == "int4_group":
            codes, factors = _int4(values), scales.float()
        else:
            codes, factors = values.float(), scales.float()
        return (codes * _spread(factors, self.scale_block, codes.shape)).to(torch.bfloat16)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[expert] for expert in range(len(self)))


def _spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A scale for each element of [N, K]."""
    high, wide = scales.shape
    spread = scales[:, None, :, None].expand(high, block[0], wide, block[1])
    return spread.reshape(high * block[0], wide * block[1])[: shape[0], : shape[1]]


def _e2m1(packed: Tensor) -> Tensor:
    """[N, K] float32 of [N, K / 2] bytes: sign, two bits of exponent, one of mantissa."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int32)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    quarters = torch.where(exponent > 0, (2 + mantissa) << exponent, 2 * mantissa)
    # Multiplied, so that code 8 is -0.
    return quarters * torch.where(codes >= 8, -0.25, 0.25)


def _e8m0(codes: Tensor) -> Tensor:
    """float32 of exponents: 2^(code - 127), which is subnormal for 0; 255 is NaN."""
    bits = codes.to(torch.int32) << 23
    bits = torch.where(codes == 0, 1 << 22, torch.where(codes == 255, 0x7FC00000, bits))
    return bits.to(torch.int32).view(torch.float32)


def _int4(packed: Tensor) -> Tensor:
    """[N, K] float32 of [N, K / 8] words of eight integers plus 8, the lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return (((packed[..., None] >> shifts) & 15) - 8).flatten(-2).float()
