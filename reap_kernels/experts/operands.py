"""The right operand of a grouped product on a GPU, as kernels take it: nothing of it is copied."""

from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels.errors import BackendUnavailable
from reap_kernels.experts.tables import Tables
from reap_kernels.quantized import Quantized
from reap_kernels.types import Matrices


@dataclass(frozen=True)
class Scales:
    """Scales of FP8 codes, and which rows of the matrix an operand has.

    Attributes:
        of_blocks: [E, R, C], one for each block of the whole matrix.
        block: rows and columns of a block.
        first, step: row n of the operand is row first + step * n of the matrix.
    """

    of_blocks: Tensor
    block: tuple[int, int]
    first: int
    step: int


@dataclass(frozen=True)
class Operand:
    """The right operand of a product: one [N, K] matrix per expert, and its bias.

    Attributes:
        base: the stacked tensor, or with `table` [E] int64 addresses.
        strides: elements between experts, rows and columns.
        shape: (N, K).
        table: whether `base` holds addresses.
        aligned: whether every address is a multiple of 16 bytes.
        bias: [E, N] or None.
        scales: of FP8 codes, which `base` then has; else None.
    """

    base: Tensor
    strides: tuple[int, int, int]
    shape: tuple[int, int]
    table: bool
    aligned: bool
    bias: Tensor | None
    scales: Scales | None = None

    @classmethod
    def of(cls, matrices: Matrices, bias: Tensor | None) -> "Operand":
        """Describes weights where they lie."""
        if isinstance(matrices, Quantized):
            return cls.of_codes(matrices, bias, slice(0, None))
        if isinstance(matrices, Tensor):
            e, n, k = matrices.stride()
            shape = (matrices.shape[1], matrices.shape[2])
            return cls(matrices, (e, n, k), shape, False, True, bias)
        first = matrices[0]
        addresses = tuple(matrix.data_ptr() for matrix in matrices)
        n, k = first.stride()
        aligned = all(address % 16 == 0 for address in addresses)
        table = _ADDRESSES.on_device(
            addresses, first.device, lambda: torch.tensor(addresses, dtype=torch.int64)
        )
        return cls(table, (0, n, k), (first.shape[0], first.shape[1]), True, aligned, bias)

    @classmethod
    def of_codes(cls, matrices: Quantized, bias: Tensor | None, rows: slice) -> "Operand":
        """Describes FP8 codes where they lie; `rows` of every matrix, from a first on, which is not
        below 0.
        """
        part = matrices.values[:, rows]
        scales = Scales(matrices.scales, matrices.block, rows.start, rows.step or 1)
        expert, row, column = part.stride()
        shape = (part.shape[1], part.shape[2])
        return cls(part, (expert, row, column), shape, False, True, bias, scales)

    def block_scales(self) -> Scales:
        """The scales; raises where the operand has none."""
        if self.scales is None:
            raise BackendUnavailable(
                f"the FP8 kernel reads fp8_block experts, not {self.base.dtype}; take another "
                "launch"
            )
        return self.scales

    def added(self, biased: bool) -> Tensor:
        """The bias as kernels take it: zeros where only the other half has one, a stand-in that is
        not read where neither has.
        """
        if self.bias is not None:
            return self.bias
        return torch.zeros(1, dtype=torch.float32, device=self.base.device) if biased else self.base

    def bias_strides(self) -> tuple[int, int]:
        """Elements between experts and columns of the bias."""
        return (0, 0) if self.bias is None else (self.bias.stride(0), self.bias.stride(1))


_ADDRESSES = Tables()
