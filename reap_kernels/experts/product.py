"""One grouped product with its epilogue, by the Triton kernel that its launch names."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reap_kernels import device
from reap_kernels.activation import Activation
from reap_kernels.errors import BackendUnavailable
from reap_kernels.experts import kernel_fp8, kernel_tma, kernel_triton
from reap_kernels.experts.operands import Operand
from reap_kernels.experts.request import boxed
from reap_kernels.scratch import launch_with_scratch
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.tuning import FP8, Launch


@dataclass(frozen=True)
class _Call:
    """Arguments of `product`, and what its kernels take alike of them."""

    a: Tensor
    b: Operand
    gate: Operand | None
    rows: SortedSlots
    launch: Launch
    activation: Activation | None
    gather: bool
    out: Tensor

    @property
    def first(self) -> Operand:
        """The gate half, or `b` where there is none."""
        return self.b if self.gate is None else self.gate

    @property
    def biased(self) -> bool:
        """Whether a half has a bias."""
        return self.b.bias is not None or self.first.bias is not None

    @property
    def blocks(self) -> int:
        """Most blocks of `out` there can be."""
        columns = -(-self.b.shape[0] // self.launch.block_n)
        return self.rows.tiles(self.launch.block_m).bound * columns

    def biases(self) -> tuple[Tensor, Tensor]:
        """Of both halves."""
        return self.b.added(self.biased), self.first.added(self.biased)

    def sorted_rows(self) -> tuple[Tensor, ...]:
        """The routing, and the tiles of rows."""
        tiles = self.rows.tiles(self.launch.block_m)
        return self.rows.gather_index, self.rows.offsets, *tiles.tensors

    def formula(self) -> tuple[float, float]:
        """Limit and slope of the activation."""
        own = self.activation
        return (float("inf"), 0.0) if own is None else (own.limit, own.alpha)

    def bias_strides(self) -> tuple[int, ...]:
        """Elements between experts and columns, of both halves."""
        return *self.b.bias_strides(), *self.first.bias_strides()

    def options(self, **own: Any) -> dict[str, Any]:
        """What kernels are compiled for, with a kernel's own."""
        launch, depth = self.launch, self.b.shape[1]
        return {
            "TOP_K": self.rows.top_k,
            "GATHER": self.gather,
            "ACTIVATION": "none" if self.activation is None else self.activation.kind,
            "BIASED": self.biased,
            "UPCAST": self.a.dtype == torch.bfloat16 and device.interpreted(),
            "EVEN_K": depth % launch.block_k == 0,
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "BLOCK_K": launch.block_k,
            "GROUP_M": launch.group_m,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            **own,
            **device.OPTIONS,
        }


def product(
    a: Tensor,
    b: Operand,
    rows: SortedSlots,
    launch: Launch,
    *,
    gate: Operand | None = None,
    activation: Activation | None = None,
    gather: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """One grouped product with its epilogue.

    Args:
        a: [T, K] with `gather`, else [S, K] by sorted row.
        b: the right operand.
        rows: the routing.
        launch: tiles, and the kernel.
        gate: the gate half, for a gated activation.
        activation: applied to the product; None for none.
        gather: whether sorted rows are looked up in `a` by token.
        out: from `room_for`, whose rows of these experts are written and which is then returned as
            `a`'s dtype has it; default new.

    Returns:
        [S, N] in `a`'s dtype; rows that no expert serves are not written.

    Raises:
        BackendUnavailable: `launch` names the kernel `tma`, which cannot read these operands.
    """
    out = room_for(rows, b.shape[0], a) if out is None else out
    call = _Call(a, b, gate, rows, launch, activation, gather, out)
    if call.blocks:
        by = {"tma": _by_boxes, FP8: _of_codes}.get(launch.kernel, _by_pointers)
        with device.on(a.device):
            by(call)
    return out.to(a.dtype)


def _by_pointers(call: _Call) -> None:
    """A program for every tile, which reads any strides."""
    b, other, (n, depth) = call.b, call.first, call.b.shape
    kernel_triton.grouped_product[(call.blocks,)](
        call.a,
        b.base,
        other.base,
        *call.biases(),
        call.out,
        *call.sorted_rows(),
        call.rows.num_experts,
        n,
        depth,
        *call.formula(),
        *call.a.stride(),
        *b.strides,
        *call.bias_strides(),
        **call.options(
            TABLE=b.table,
            ALIGNED=b.aligned and other.aligned,
            PRECISION=precision(call.a.dtype),
            EVEN_N=n % call.launch.block_n == 0,
        ),
    )


def _by_boxes(call: _Call) -> None:
    """As many programs as run at once, which read boxes by TMA."""
    a, b, first, (n, depth) = call.a, call.b, call.first, call.b.shape
    apart = (b.base.data_ptr() - first.base.data_ptr()) // a.element_size()
    _check_boxes(call, apart)
    launch_with_scratch(
        kernel_tma.grouped_product_tma[(min(device.multiprocessors(a.device), call.blocks),)],
        a,
        first.base,
        *call.biases(),
        call.out,
        *call.sorted_rows(),
        call.rows.num_experts,
        len(call.rows.gather_index),
        n,
        depth,
        *call.formula(),
        *a.stride(),
        b.strides[0],
        apart,
        b.strides[1],
        *call.bias_strides(),
        **call.options(INTERLEAVED=0 < apart < b.strides[1], PRECISION=precision(a.dtype)),
    )


def _of_codes(call: _Call) -> None:
    """Of FP8 codes, whose scales multiply sums of a block of K."""
    b, other, (n, depth) = call.b, call.first, call.b.shape
    scales, scales_gate = b.block_scales(), other.block_scales()
    kernel_fp8.grouped_product_fp8[(call.blocks,)](
        call.a,
        b.base,
        other.base,
        scales.of_blocks,
        scales_gate.of_blocks,
        *call.biases(),
        call.out,
        *call.sorted_rows(),
        call.rows.num_experts,
        n,
        depth,
        *call.formula(),
        *call.a.stride(),
        *b.strides,
        scales.first,
        scales_gate.first,
        *scales.of_blocks.stride(),
        *call.bias_strides(),
        **call.options(
            STEP=scales.step,
            ROWS=scales.block[0],
            COLUMNS=scales.block[1],
            EVEN_N=n % call.launch.block_n == 0,
        ),
    )


def _check_boxes(call: _Call, apart: int) -> None:
    """Raises unless TMA reads the operands; `apart`: elements from a gate to its up."""
    a, b, gate = call.a, call.b, call.gate
    # Rows of a gate and rows of its up in turn are one matrix: all the same distance apart.
    spaced = apart >= b.strides[1] or 2 * apart == b.strides[1]
    halves = gate is None or (0 < apart < b.strides[0] and spaced and boxed(gate.base))
    own = not b.table and b.strides[0] > 0  # a matrix for each expert
    if not own or not halves or not boxed(b.base) or not (call.gather or boxed(a)):
        raise BackendUnavailable(
            f"the TMA kernel cannot read weights of strides {b.strides}, gate and up {apart} "
            f"elements apart, and rows of strides {a.stride()}: the last must be 1, gate and up in "
            "one tensor, all else above 0 and at multiples of 16 bytes; take a launch without "
            "`kernel`"
        )


def precision(dtype: torch.dtype) -> str:
    """Of a kernel's products: TF32 for float32 only where the user asked torch for it."""
    return "tf32" if device.tf32(dtype) else "ieee"


def room_for(rows: SortedSlots, n: int, a: Tensor) -> Tensor:
    """[S, N] for a product of `a`, in the dtype kernels write."""
    dtype = device.written_dtype(a.dtype)
    return torch.empty(len(rows.gather_index), n, dtype=dtype, device=a.device)
