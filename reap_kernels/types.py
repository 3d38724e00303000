"""The value types every op shares: experts' weights as the model stores them, and a routing.

`ExpertWeights` normalizes every storage layout to one mechanism: for each expert a [N, K] matrix
view (out x in) with free strides. A transposed tensor is a transposed view, a 2-D block tensor is a
reshaped view, separate modules are a sequence of views. Nothing is ever copied; matrices that are
stored quantized are a sequence that computes each when it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reap_kernels.activation import Activation
from reap_kernels.errors import DtypeError, ShapeError
from reap_kernels.quantized import Quantized

Matrices = Tensor | Sequence[Tensor]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # of expert ids
LAYOUTS = ("stacked", "table", "mixed", "quantized")


def _dims(name: str, matrices: Matrices) -> tuple[int, int, int]:
    """(E, N, K) of one matrix per expert, checked."""
    if isinstance(matrices, Tensor):
        if matrices.ndim != 3:
            raise ShapeError(
                f"ExpertWeights.{name} has shape {tuple(matrices.shape)}; give a stacked [E, N, K] "
                "view or a sequence of E [N, K] views"
            )
        return matrices.shape[0], matrices.shape[1], matrices.shape[2]
    if isinstance(matrices, Quantized):
        return matrices.shape
    shapes = {tuple(m.shape) for m in matrices}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ShapeError(
            f"ExpertWeights.{name} is a sequence of shapes {sorted(shapes)}; every expert "
            "needs the same [N, K]"
        )
    rows, cols = next(iter(shapes))
    return len(matrices), rows, cols


def _strides(matrices: Matrices) -> set[tuple[int, ...]]:
    """Strides of the experts' matrices; not of quantized ones, which have none."""
    if isinstance(matrices, Tensor):
        return {matrices.stride()}
    return {matrix.stride() for matrix in matrices}


def _tensors(matrices: Matrices) -> tuple[Tensor, ...]:
    """What the experts' matrices are stored in."""
    if isinstance(matrices, Quantized):
        return matrices.tensors()
    return (matrices,) if isinstance(matrices, Tensor) else tuple(matrices)


def _dtypes(matrices: Matrices) -> set[torch.dtype]:
    """Dtypes products read the experts' matrices in."""
    if isinstance(matrices, Quantized):
        return {matrices.dtype}
    return {tensor.dtype for tensor in _tensors(matrices)}


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one MoE layer, as views of the model's own storage.

    Attributes:
        up: [E, 2I, H] fused gate and up, or [E, I, H] up alone; stacked, one [N, K] per expert, or
            `Quantized`, as are all three matrices then, in one format.
        down: [E, H, I], likewise.
        activation: the function between the products.
        gate: [E, I, H] where gate and up are separate matrices, else None.
        up_bias: [E, N] with the rows of `up`, or None.
        gate_bias: [E, I] with the rows of `gate`, or None.
        down_bias: [E, H], or None.
        interleaved: rows of a fused `up` are g0, u0, g1, u1, ... instead of gates, then ups.
        num_experts, hidden_size, intermediate_size: E, H (the width of a token) and I (the width of
            an expert), found from the shapes.
        dtype: that all tensors share; of quantized matrices the one products read them in.
        layout: `stacked` where every matrix is a view of one tensor, `table` where experts are
            separate tensors; `mixed` where strides differ between experts, or between gate and up;
            `quantized` where matrices must be dequantized before a product reads them.
        biased: whether any product adds a bias.

    Raises:
        ShapeError: the shapes do not describe one expert layer; the message names the tensor.
        DtypeError: a tensor is not bf16, fp16, fp32 or fp64, or they differ, or some matrices are
            quantized and others are not.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> up, down = torch.randn(8, 32, 64), torch.randn(8, 64, 16)
        >>> experts = rk.ExpertWeights(up, down, rk.Activation("silu"))
        >>> experts.num_experts, experts.hidden_size, experts.intermediate_size
        (8, 64, 16)
        >>> experts.layout
        'stacked'
    """

    up: Matrices
    down: Matrices
    activation: Activation
    gate: Matrices | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    interleaved: bool = False
    # Found out once, when all matrices are looked at anyway: every call asks for them many times.
    num_experts: int = field(init=False, repr=False, compare=False)
    hidden_size: int = field(init=False, repr=False, compare=False)
    intermediate_size: int = field(init=False, repr=False, compare=False)
    dtype: torch.dtype = field(init=False, repr=False, compare=False)
    layout: str = field(init=False, repr=False, compare=False)
    biased: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        experts, hidden, inner = _dims("down", self.down)
        self._check_shapes(experts, hidden, inner)
        self._check_biases(experts, hidden, inner)
        self._check_formats()
        dtypes = {bias.dtype for bias in self._biases()}.union(*map(_dtypes, self._matrices()))
        if len(dtypes) != 1 or not dtypes <= set(FLOATS):
            raise DtypeError(
                f"ExpertWeights tensors have dtypes {sorted(map(str, dtypes))}; they must share "
                "one of bf16, fp16, fp32, fp64 (quantized weights: wrap them in Quantized; they "
                "are read in bf16)"
            )
        facts = {
            "num_experts": experts,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "dtype": dtypes.pop(),
            "layout": self._layout(),
            "biased": bool(self._biases()),
        }
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def _check_shapes(self, experts: int, hidden: int, inner: int) -> None:
        """Raises unless up and gate fit the shape of down."""
        count, rows, cols = _dims("up", self.up)
        if (count, cols) != (experts, hidden):
            raise ShapeError(
                f"ExpertWeights.up is [{count}, {rows}, {cols}] but down is [{experts}, {hidden}, "
                f"{inner}]; up must be [{experts}, N, {hidden}]"
            )
        allowed = {inner} if self.gate is not None else {inner, 2 * inner}
        gated = self.activation.gated
        if gated is not None and self.gate is None:
            allowed = {2 * inner if gated else inner}
        if rows not in allowed:
            raise ShapeError(
                f"ExpertWeights.up has {rows} rows per expert; activation {self.activation.kind!r} "
                f"with intermediate size {inner} needs {' or '.join(map(str, sorted(allowed)))}"
            )
        if self.gate is not None and _dims("gate", self.gate) != (experts, inner, hidden):
            raise ShapeError(
                f"ExpertWeights.gate is {_dims('gate', self.gate)}; it must match up: "
                f"{(experts, inner, hidden)}"
            )
        if self.gate is not None and (self.interleaved or gated is False):
            raise ShapeError(
                "ExpertWeights.gate is a separate matrix, so `interleaved` and an ungated "
                "activation have no meaning; drop one of them"
            )

    def _check_biases(self, experts: int, hidden: int, inner: int) -> None:
        """Raises unless every bias fits its matrix."""
        biases = {"up_bias": _dims("up", self.up)[1], "gate_bias": inner, "down_bias": hidden}
        for name, width in biases.items():
            bias = getattr(self, name)
            if bias is not None and tuple(bias.shape) != (experts, width):
                raise ShapeError(
                    f"ExpertWeights.{name} is {tuple(bias.shape)}; expected {(experts, width)}"
                )
        if self.gate_bias is not None and self.gate is None:
            raise ShapeError("ExpertWeights.gate_bias needs a separate `gate`; use up_bias instead")

    def _check_formats(self) -> None:
        """Raises unless all matrices are quantized alike, or none is."""
        kinds = [
            f"{m.format} in blocks of {m.block}" if isinstance(m, Quantized) else "not quantized"
            for m in self._matrices()
        ]
        if len(set(kinds)) > 1:
            names = "up, gate and down" if self.gate is not None else "up and down"
            raise DtypeError(
                f"ExpertWeights.{names} are {', '.join(kinds)}; give all of them in one format, or "
                "dequantize them"
            )

    def _matrices(self) -> tuple[Matrices, ...]:
        """Up, gate where it is separate, and down."""
        return tuple(m for m in (self.up, self.gate, self.down) if m is not None)

    def _biases(self) -> tuple[Tensor, ...]:
        """Every bias there is."""
        biases = (self.up_bias, self.gate_bias, self.down_bias)
        return tuple(bias for bias in biases if bias is not None)

    @property
    def device(self) -> torch.device:
        """The device the weights lie on."""
        matrices = self.down
        return (matrices if isinstance(matrices, Tensor | Quantized) else matrices[0]).device

    def _layout(self) -> str:
        if isinstance(self.down, Quantized):
            return "quantized"
        strides = [_strides(m) for m in self._matrices()]
        alike = all(len(own) == 1 for own in strides)
        if not alike or (self.gate is not None and strides[0] != strides[1]):
            return "mixed"
        stacked = all(isinstance(m, Tensor) for m in (self.up, self.down))
        return "stacked" if stacked else "table"

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor described, in a fixed order."""
        matrices = (tensor for m in self._matrices() for tensor in _tensors(m))
        return (*matrices, *self._biases())

    def project(self, expert: int, x: Tensor) -> Tensor:
        """f(x) of one expert, before the router weight, computed in `x`'s dtype.

        Args:
            expert: 0 <= expert < E.
            x: [n, H]; weights are converted to its dtype where they differ.

        Returns:
            [n, H].
        """
        return self.output(expert, self.inner(expert, x))

    def inner(self, expert: int, x: Tensor) -> Tensor:
        """h(x) of one expert, what its down projection reads: [n, I] of x [n, H], in its dtype."""
        projected = _product(expert, x, self.up, self.up_bias)
        if self.gate is not None:
            gate = _product(expert, x, self.gate, self.gate_bias)
            projected = torch.cat([gate, projected], dim=-1)
        return self.activation.apply(projected, interleaved=self.interleaved)

    def output(self, expert: int, h: Tensor) -> Tensor:
        """The down projection of one expert: [n, H] of h [n, I], in its dtype."""
        return _product(expert, h, self.down, self.down_bias)


def _product(expert: int, a: Tensor, matrices: Matrices, bias: Tensor | None) -> Tensor:
    """a [n, K] times one expert's matrix, transposed, with its bias, in a's dtype: [n, N]."""
    matrix, own = matrices[expert], None if bias is None else bias[expert].to(a.dtype)
    if matrix.dtype != a.dtype:  # asking is cheaper than a conversion that does nothing
        matrix = matrix.to(a.dtype)
    return torch.nn.functional.linear(a, matrix, own)


@dataclass(frozen=True)
class Routing:
    """The (token, slot) rows of one batch, sorted by expert.

    Attributes:
        gather_index: [S] int64, S = T * k: flat slot t * k + j of each sorted row, ascending within
            an expert; slots that are not served here (foreign id, weight exactly 0) come last.
        offsets: [E + 1] int64: rows of expert e are `gather_index[offsets[e] : offsets[e + 1]]`.
        top_k: k, so that `gather_index // top_k` are token indices.

    Example:
        >>> ids = torch.tensor([[0, 2], [2, 1]])
        >>> routing = rk.sort_by_expert(ids, num_experts=3)
        >>> routing.offsets.tolist()  # rows of expert 0, 1 and 2 end here
        [0, 1, 2, 4]
    """

    gather_index: Tensor
    offsets: Tensor
    top_k: int
