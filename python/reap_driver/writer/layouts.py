"""How quantizers store a matrix of experts, tensor by tensor, and how each tensor is cut.

A matrix [out, in] has experts along `out`: a router, or matrices of experts concatenated. A stack
[experts, ...] has them along its first dimension. Quantizers store it as:

GPTQ                qweight [in * bits / 32, out], codes packed along in; qzeros [groups,
                    out * bits / 32], packed along out; scales [groups, out]; g_idx [in]
AWQ                 qweight [in, out / 8] and qzeros [groups, out / 8], eight 4-bit codes of a word
                    in the order 0 2 4 6 1 3 5 7; scales [groups, out]
compressed-tensors  weight_packed [out, in * bits / 32]; weight_scale [out, groups], [out, 1] or
                    [1]; weight_zero_point packed along out, [out * bits / 32, groups] (of 8-bit
                    integers: [out, groups]); weight_shape: the two lengths; weight_g_idx [in]
FP8                 weight_scale_inv or weight_scale: one, [out], [out, 1], or one per block
NVFP4, MXFP4, MXFP8 weight [out, in / 2] (bytes of two codes) and weight_scale [out, in / group]
bitsandbytes, int8  SCB [out]; weight_format: one number
MXFP4 of gpt-oss    a stack's `_blocks` and `_scales`

Lengths are compared with those of the matrix. A tensor of another shape or name is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from reap_driver.files.quantization import Quantization
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.model.expert_layout import ExpertDim, Shape
from reap_driver.writer.actions import Action, Copy, Select, SelectCodes, SetLength
from reap_driver.writer.codes import WORD_BITS, words_of
from reap_kernels.errors import UnsupportedModel

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of a word's codes, lowest bits first
_AWQ_BITS = 4
_GPTQ_BITS = (2, 3, 4, 8)
_FULL_SIZE = "apply the plan to the checkpoint it was quantized from, and quantize the result"
# Tensors that hold the values themselves; others only accompany them.
VALUES = frozenset({"weight", "qweight", "weight_packed", "packed", "blocks"})
# One number for a whole matrix.
_SCALARS = frozenset(
    {"weight_scale_2", "input_scale", "output_scale", "input_zero_point", "weight_format"}
    | {"weight_global_scale", "input_global_scale"}
)
# Of a stack: tensors with an entry per expert along the first dimension, and the fewest dimensions
# that they have; then scales, which may also be one number per expert, or one for all.
_STACKED = {
    **dict.fromkeys(VALUES | {"qzeros", "scales", "weight_zero_point"}, 3),
    **dict.fromkeys(("bias", "g_idx", "zero_point"), 2),
}
_STACKED_SCALES = frozenset(
    {"scale", "scale_inv", "weight_scale", "weight_scale_inv", "scale_2"} | _SCALARS
)


@dataclass(frozen=True)
class Matrix:
    """A tensor of the model, and where it holds experts."""

    name: str
    shape: Shape
    expert: ExpertDim

    @property
    def is_stack(self) -> bool:
        """Whether each expert is one slice of the first dimension."""
        return len(self.shape) > 2 and self.expert.dim == 0 and self.expert.block == 1

    def of(self, expert: ExpertDim) -> "Matrix":
        """The same matrix of a layer with another number of experts."""
        shape = list(self.shape)
        shape[expert.dim] = expert.length(expert.experts)
        return Matrix(self.name, tuple(shape), expert)


@dataclass(frozen=True)
class Stored:
    """One tensor on disk.

    Attributes:
        key, entry: its name and header.
        leaf: the rest of its name: "qzeros" of "gate.qzeros", "blocks" of "down_proj_blocks".
        beside: finds the tensor of the same matrix with another leaf; None if there is none.
    """

    key: str
    entry: TensorEntry
    leaf: str
    beside: Callable[[str], TensorEntry | None]

    @property
    def shape(self) -> Shape:
        """Its shape on disk."""
        return self.entry.shape


def cut(stored: Stored, matrix: Matrix, kept: tuple[int, ...], method: Quantization) -> Action:
    """The action on one of the tensors that store a matrix, if some of its experts are kept.

    Raises:
        UnsupportedModel: the quantizer is not known to have a tensor of that name and shape, or
            experts cannot be removed from it separately; names tensor, format and remedy.
    """
    if matrix.is_stack:
        return _stack(stored, matrix, kept, method)
    if len(matrix.shape) != 2 or matrix.expert.dim != 0 or 0 in (*matrix.shape, *stored.shape):
        raise _unread(stored, matrix, method)
    return _Rows(stored, matrix, kept, method).action()


def _stack(stored: Stored, matrix: Matrix, kept: tuple[int, ...], method: Quantization) -> Action:
    """A tensor of a stack."""
    shape, experts = stored.shape, matrix.expert.experts
    one = math.prod(shape) == 1 and experts > 1
    if stored.leaf in _STACKED_SCALES and one:
        return Copy(stored.key)  # one scale for all experts
    if stored.leaf == "weight_shape":
        if shape == (3,):
            return SetLength(stored.key, 0, experts, len(kept))
        if shape == (2,):
            return Copy(stored.key)  # of one expert's matrix
    fewest = 1 if stored.leaf in _STACKED_SCALES else _STACKED.get(stored.leaf)
    if fewest is not None and len(shape) >= fewest and shape[0] == experts:
        return Select(stored.key, 0, (matrix.expert.rows(kept),))
    raise _unread(stored, matrix, method)


class _Rows:
    """A tensor of a matrix [out, in] with experts along `out`."""

    def __init__(
        self, stored: Stored, matrix: Matrix, kept: tuple[int, ...], method: Quantization
    ) -> None:
        self._stored, self._matrix, self._method = stored, matrix, method
        self._key, self._shape = stored.key, stored.shape
        self._out, self._in = matrix.shape
        self._kept = kept
        self._rows = matrix.expert.rows(kept)

    def action(self) -> Action:
        """The action by the name of the tensor; a `weight` has another shape than in the model."""
        leaf = self._stored.leaf
        if leaf in ("qweight", "qzeros", "scales", "g_idx"):
            rules = {"gptq": self._gptq, "awq": self._awq}
            rule = rules.get(self._method.packing or "", lambda _: None)
            found = rule(leaf)
        elif leaf in _SCALARS:
            found = Copy(self._key) if math.prod(self._shape) == 1 else None
        elif leaf == "bias" or (leaf == "SCB" and self._method.method == "bitsandbytes"):
            found = self._select(0) if self._shape == (self._out,) else None
        elif leaf in ("weight_scale", "weight_scale_inv"):
            found = self._scale()
        else:
            found = self._compressed(leaf)
        if found is None:
            raise _unread(self._stored, self._matrix, self._method)
        return found

    def _select(self, dim: int) -> Action:
        return Select(self._key, dim, (self._rows,))

    def _gptq(self, leaf: str) -> Action | None:
        qweight = self._stored.beside("qweight")
        if qweight is None or len(qweight.shape) != 2 or qweight.dtype != "I32":
            return None
        bits, rest = divmod(qweight.shape[0] * WORD_BITS, self._in)
        if rest or bits not in _GPTQ_BITS or qweight.shape[1] != self._out:
            return None
        if leaf == "qweight":
            return self._select(1)
        if leaf == "g_idx":
            return Copy(self._key) if self._shape == (self._in,) else None
        if len(self._shape) != 2 or self._in % self._shape[0]:
            return None
        if leaf == "scales":
            return self._select(1) if self._shape[1] == self._out else None
        if self._shape[1] != words_of(self._out, bits) or self._stored.entry.dtype != "I32":
            return None
        self._check_words(bits, "GPTQ")
        return SelectCodes(self._key, 1, bits, self._rows)

    def _awq(self, leaf: str) -> Action | None:
        if leaf == "g_idx" or len(self._shape) != 2 or self._in % self._shape[0]:
            return None
        if leaf == "scales":
            return self._select(1) if self._shape[1] == self._out else None
        packed = words_of(self._out, _AWQ_BITS)
        if self._shape[1] != packed or self._stored.entry.dtype != "I32":
            return None
        if leaf == "qweight" and self._shape[0] != self._in:
            return None
        self._check_words(_AWQ_BITS, "AWQ")
        per_word = len(_AWQ_ORDER)
        place = {output: position for position, output in enumerate(_AWQ_ORDER)}
        ordered = (
            self._rows[first + output]
            for first in range(0, len(self._rows), per_word)
            for output in _AWQ_ORDER
        )
        positions = tuple(row - row % per_word + place[row % per_word] for row in ordered)
        return SelectCodes(self._key, 1, _AWQ_BITS, positions)

    def _check_words(self, bits: int, name: str) -> None:
        """Checks that the outputs fill whole words, as loaders of these formats demand."""
        per_word = WORD_BITS // math.gcd(WORD_BITS, bits)
        if len(self._rows) % per_word:
            tail = self._matrix.expert.tail
            less = f" less {tail}, for the rows behind them," if tail else ""
            raise UnsupportedModel(
                f"{self._key}: {name} packs the {bits}-bit codes of {per_word} outputs into whole "
                f"words, and vLLM and Auto{name} load no others, but {len(self._rows)} rows would "
                f"be left; keep a multiple of {per_word} experts{less} or {_FULL_SIZE}."
            )

    def _scale(self) -> Action | None:
        """Scales of rows, of groups inside rows, or of blocks of rows."""
        shape = self._shape
        if math.prod(shape) == 1:
            return Copy(self._key)
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] > self._in):
            return None
        if shape[0] == self._out:
            return self._select(0)
        block, per_expert = self._method.block, self._matrix.expert.block
        if block is None or len(shape) != 2 or shape[0] != -(-self._out // block):
            return None
        if shape[0] == 1:
            return Copy(self._key)  # all rows share the scales, also those that are kept
        if per_expert % block == 0 and not self._matrix.expert.tail:
            rows = self._matrix.expert.rows(self._kept, per_expert // block)
            return Select(self._key, 0, (rows,))
        raise UnsupportedModel(
            f"{self._key}: a block of {block} rows of {self._matrix.name} shares its scales, and "
            f"the rows of one expert ({per_expert}) are no whole blocks, so those of removed "
            f"experts cannot be taken out; {_FULL_SIZE}."
        )

    def _compressed(self, leaf: str) -> Action | None:
        """Tensors of compressed-tensors, and weights with two codes per byte."""
        shape, dtype = self._shape, self._stored.entry.dtype
        if leaf in ("weight", "weight_packed") and dtype in ("U8", "I8", "F4"):
            codes = 1 if dtype == "F4" else 2
            halves = shape == (self._out, self._in // codes) and self._in % codes == 0
            return self._select(0) if halves and self._bytes_along_inputs(leaf) else None
        if leaf == "weight_packed":
            return self._select(0) if self._packed_bits(self._stored.entry) else None
        if leaf == "weight_shape":
            before, after = self._out, len(self._rows)
            return SetLength(self._key, 0, before, after) if shape == (2,) else None
        if leaf == "weight_g_idx":
            return Copy(self._key) if shape == (self._in,) else None
        return self._zero_point() if leaf == "weight_zero_point" else None

    def _bytes_along_inputs(self, leaf: str) -> bool:
        """Whether this quantizer is known to put two codes of one row into a byte."""
        method = self._method.method or ""
        if method.startswith("modelopt"):  # whose 4-bit integers go along the outputs
            return "FP4" in str(self._method.settings.get("quant_algo", "")).upper()
        if "auto-round" in method:
            return leaf == "weight_packed"
        return method in ("compressed-tensors", "mxfp4", "nvfp4", "quark")

    def _packed_bits(self, packed: TensorEntry | None) -> int | None:
        """Bits of the codes in `weight_packed` [out, in * bits / 32]."""
        if packed is None or packed.dtype != "I32" or len(packed.shape) != 2:
            return None
        bits, rest = divmod(packed.shape[1] * WORD_BITS, self._in)
        return bits if not rest and bits in range(1, 9) and packed.shape[0] == self._out else None

    def _zero_point(self) -> Action | None:
        """Zero points: packed along the rows if the weights are packed, the last word filled with
        0.
        """
        shape, dtype = self._shape, self._stored.entry.dtype
        bits = self._packed_bits(self._stored.beside("weight_packed"))
        if bits is None and dtype != "I32":
            if math.prod(shape) == 1:
                return Copy(self._key)
            return self._select(0) if shape[0] == self._out else None
        if bits is None:
            return None
        if dtype != "I32" or len(shape) != 2 or shape[0] != words_of(self._out, bits):
            return None
        return SelectCodes(self._key, 0, bits, self._rows)


def _unread(stored: Stored, matrix: Matrix, method: Quantization) -> UnsupportedModel:
    """An error about a tensor of an unknown layout."""
    return UnsupportedModel(
        f"{stored.key}: {stored.entry.dtype} {list(stored.shape)} stores {matrix.name} "
        f"{list(matrix.shape)} in a layout that is not read ({method}), so where it holds experts "
        f"is unknown; {_FULL_SIZE}."
    )
