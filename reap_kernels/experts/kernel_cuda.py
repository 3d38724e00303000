"""CUDA products for Hopper: launches of `csrc/grouped.cu`, and what they can read.

One launch multiplies all experts' matrices, with a gather before and an activation after. The
kernels read matrices by TMA, where they lie: stacked, or one tensor per expert, which maps in
device memory describe.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels import cuda, device
from reap_kernels.activation import Activation
from reap_kernels.errors import KernelError
from reap_kernels.experts.tables import Tables
from reap_kernels.sort.slots import SortedSlots
from reap_kernels.types import ExpertWeights, Matrices

DTYPES = (torch.bfloat16, torch.float16)
# Elements of 16 bytes, which TMA loads at least.
CHUNK = 8
_REACH = 1 << 40  # bytes between neighbors in a tensor map
# Tiles that use a weight tile before the next; nobody has compared others.
GROUP = 8

_PRODUCT = cuda.Kernel(
    "multiply_experts",
    tokens=DTYPES,
    gather_index=torch.int64,
    table=torch.uint8,
    offsets=torch.int64,
    tile_experts=torch.int32,
    tile_rows=torch.int32,
    firsts=torch.int32,
)


@dataclass(frozen=True)
class Half:
    """The matrices [N, K] of one product of an expert, or the gate half of them, and their bias.

    Attributes:
        addresses: of each expert's matrix; of stacked ones the first alone.
        experts: E.
        strides: elements between experts (0 where each has its address), rows and columns.
        shape: (N, K).
        dtype: of the elements.
        bias: [E, N] or None.
    """

    addresses: tuple[int, ...]
    experts: int
    strides: tuple[int, int, int]
    shape: tuple[int, int]
    dtype: torch.dtype
    bias: Tensor | None

    @classmethod
    def of(cls, matrices: Matrices, bias: Tensor | None, rows: slice = slice(None)) -> "Half":
        """Describes some rows of every expert's matrix where they lie; nothing is copied."""
        own = None if bias is None else bias[:, rows]
        experts = len(matrices)
        if isinstance(matrices, Tensor):
            part, between = matrices[0, rows], matrices.stride(0)
            # An expanded stack has one matrix for all experts.
            addresses = (part.data_ptr(),) * (1 if between else experts)
        else:
            part, between = matrices[0][rows], 0
            offset = part.data_ptr() - matrices[0].data_ptr()
            addresses = tuple(matrix.data_ptr() + offset for matrix in matrices)
        (n, k), (row, column) = part.shape, part.stride()
        return cls(addresses, experts, (between, row, column), (n, k), part.dtype, own)

    @property
    def table(self) -> bool:
        """Whether a table says where each expert's matrix lies."""
        return len(self.addresses) > 1

    def refusal(self) -> str | None:
        """Why the kernels cannot read these matrices, or None."""
        n, k = self.shape
        if self.dtype not in DTYPES:
            return f"weights are {self.dtype}; it takes bfloat16 and float16"
        if n % CHUNK or k % CHUNK:
            return f"matrices are {n} x {k}; TMA needs multiples of {CHUNK}"
        if self.strides[2] != 1:
            return "weights are stored transposed, which it does not read"
        if self.strides[1] % CHUNK or self.strides[0] % CHUNK:
            return f"strides of weights are {self.strides}; TMA needs multiples of {CHUNK}"
        if any(address % 16 for address in self.addresses):
            return "weights do not begin at multiples of 16 bytes, as TMA needs"
        return None


def first_halves(experts: ExpertWeights) -> tuple[Half, Half | None]:
    """Up and gate of the first product; one half where it has no gate."""
    if experts.gate is not None:
        return Half.of(experts.up, experts.up_bias), Half.of(experts.gate, experts.gate_bias)
    if not experts.activation.gated:
        return Half.of(experts.up, experts.up_bias), None
    inner = experts.intermediate_size
    gates, ups = slice(0, inner), slice(inner, None)
    if experts.interleaved:
        gates, ups = slice(0, None, 2), slice(1, None, 2)
    return Half.of(experts.up, experts.up_bias, ups), Half.of(experts.up, experts.up_bias, gates)


def device_refusal(where: torch.device) -> str | None:
    """Why nothing of this file runs on `where`, or None."""
    reason = cuda.refusal(where)
    if reason is None and where.type == "cuda" and device.architecture(where) != "sm90":
        return f"it is written for sm_90 (H100, H200), and {where} is {device.architecture(where)}"
    return reason


def refusal(where: torch.device, up: Half, gate: Half | None = None) -> str | None:
    """Why a product cannot run on `where`, or None."""
    reason = device_refusal(where)
    if reason is not None:
        return reason
    if gate is None:
        return up.refusal()
    reason = up.refusal() or gate.refusal()
    if reason is not None:
        return reason
    if (up.strides, up.shape, len(up.addresses)) != (
        gate.strides,
        gate.shape,
        len(gate.addresses),
    ):
        return "gate and up have different strides, and one tensor map reads both"
    apart = [abs(a - b) for a, b in zip(up.addresses, gate.addresses, strict=True)]
    if not all(apart):
        return "gate and up of an expert are one matrix, and a tensor map reads two"
    if max(apart) >= _REACH:
        return f"gate and up lie {max(apart)} bytes apart; a tensor map reaches {_REACH}"
    return None


def _described(up: Half, gate: Half | None, where: torch.device) -> Tensor:
    """The maps in host memory."""
    ups = torch.tensor(up.addresses, dtype=torch.int64)
    gates = None if gate is None else torch.tensor(gate.addresses, dtype=torch.int64)
    module = cuda.required(where)
    size = module.table_bytes(experts=up.experts)
    # Maps are read at multiples of 128 bytes; torch's own alignment is 64 on the CPU.
    room = torch.empty(size + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 128
    table = room[start : start + size]
    with device.on(where):
        status = module.describe_experts(
            dtype=module.DTYPES[str(up.dtype).removeprefix("torch.")],
            ups=ups.data_ptr(),
            gates=0 if gates is None else gates.data_ptr(),
            row_stride=up.strides[1],
            experts=up.experts,
            width=up.shape[0],
            depth=up.shape[1],
            table=table.data_ptr(),
            device=cuda.number(where),
        )
    if status:
        raise KernelError(
            f"tensor maps of {up.experts} experts of {up.shape[0]} x {up.shape[1]} could not be "
            f"encoded for {where}: {module.error(status)}; REAP_BACKEND=triton runs without them"
        )
    return table


_MAPS = Tables()


def _maps(up: Half, gate: Half | None, where: torch.device) -> Tensor:
    """[bytes] uint8 on `where`; see `describe_experts` of csrc/kernels.h."""
    key = (up.addresses, gate and gate.addresses, up.strides, up.shape, up.dtype)
    return _MAPS.on_device(key, where, lambda: _described(up, gate, where))


def weight_arguments(
    up: Half, gate: Half | None, where: torch.device
) -> dict[str, Tensor | float | None]:
    """A product's weights and biases, by the launcher's names; `gate` has `up`'s strides."""
    return {
        "up": up.addresses[0],
        "gate": 0 if gate is None else gate.addresses[0],
        "expert_stride": up.strides[0],
        "row_stride": up.strides[1],
        "table": _maps(up, gate, where) if up.table else None,
        **_bias("bias", up),
        **_bias("gate_bias", gate),
    }


def _bias(name: str, half: Half | None) -> dict[str, int]:
    """Address and strides of a half's bias."""
    bias = None if half is None else half.bias
    return {
        name: 0 if bias is None else bias.data_ptr(),
        f"{name}_expert_stride": 0 if bias is None else bias.stride(0),
        f"{name}_row_stride": 0 if bias is None else bias.stride(1),
    }


def product(
    a: Tensor,
    up: Half,
    rows: SortedSlots,
    *,
    gate: Half | None = None,
    activation: Activation | None = None,
    gather: bool = False,
    group: int = GROUP,
) -> Tensor:
    """One grouped product with its epilogue; `refusal` says what it takes.

    Args:
        a: [T, K] with `gather`, else [S, K] by sorted row; contiguous, of the weights' dtype.
        up: the right operand.
        rows: the routing.
        gate: the gate half, for a gated activation.
        activation: applied to the product; None for none.
        gather: whether sorted rows are looked up in `a` by token.
        group: tiles of rows that use a tile of weights before the next.

    Returns:
        [S, N] in `a`'s dtype; rows that no expert serves are not written.
    """
    where, (n, depth) = a.device, up.shape
    slots = len(rows.gather_index)
    out = torch.empty(slots, n, dtype=a.dtype, device=where)
    if not slots:
        return out
    tiles = rows.tiles(cuda.constant(where, "PRODUCT_ROWS"))
    kind = "none" if activation is None else activation.kind
    _PRODUCT(
        where,
        f"S = {slots}, N x K = {n} x {depth}, E = {up.experts}, activation {kind!r}",
        tokens=a,
        token_rows=len(a),
        token_stride=depth,
        gather_index=rows.gather_index if gather else None,
        top_k=rows.top_k,
        **weight_arguments(up, gate, where),
        formula=cuda.required(where).FORMULAS[kind],
        limit=float("inf") if activation is None else activation.limit,
        alpha=0.0 if activation is None else activation.alpha,
        offsets=rows.offsets,
        tile_experts=tiles.experts,
        tile_rows=tiles.rows,
        firsts=tiles.firsts,
        out=out.data_ptr(),
        slots=slots,
        experts=up.experts,
        width=n,
        depth=depth,
        group=group,
    )
    return out
