"""Triton's interpreter without its largest costs, which no result depends on, and stricter.

Before a kernel runs, the interpreter replaces the functions of `triton.language` and puts them back
afterwards. It replaces them again, looking through four modules, at every call of a function inside
the kernel. Here only those of `triton.language.core`, which a kernel's own module does not name,
are replaced at such a call, and once.

For each sum, difference and product of integers it interprets a dozen more operations that look for
an overflow, and then, outside of its debug mode, ignores what they find; here numpy does the same
check, and an overflow is an error. It makes a table of all types to look up one, and Triton
integers of a shape for every value; here both are kept. All of this together took three quarters
of the time of a layer.

An operation of a kernel takes it as long as thousands of elements do, so a loop over small pieces
is slow. The sort counts the ranks of slots in pieces of 8, as suits a GPU; here in pieces of 128.
`tests/ops/test_triton.py` shows that the result is the same.
"""

import functools
import operator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from reap_kernels.sort import gpu

SORT_CHUNK = gpu._CHUNK  # what the library uses
gpu._CHUNK = 128
_OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
_POINTER = np.dtype(np.uint64)


def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """As `InterpretedFunction.__call__`."""
    names = self.fn.__globals__
    if tl not in names.values() and names["__name__"] not in _replaced:
        interpreter._patch_lang(self.fn)
        _replaced.add(names["__name__"])
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _check_overflow(self: TritonSemantic, left: Any, right: Any, operation: Any) -> None:
    """As `TritonSemantic.binary_op_sanitize_overflow_impl` in debug mode."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    wide = [value.handle.data.astype(np.int64) for value in (left, right)]
    found = _OPERATORS[operation.__name__](*wide)
    fits = kind.get_int_min_value() <= found.min() <= found.max() <= kind.get_int_max_value()
    assert fits, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"


def _np_dtype(kind: Any) -> np.dtype[Any]:
    """As `interpreter._get_np_dtype`."""
    scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return _POINTER if isinstance(scalar, tl.pointer_type) else _number(scalar)


def _new_tensor(self: tl.tensor, handle: Any, type: Any) -> None:
    """As `tl.tensor.__init__`."""
    super(tl.tensor, self).__init__()
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _extent(tuple(type.shape) if type.is_block() else ())


def _new_block_type(self: tl.block_type, element_ty: Any, shape: Any) -> None:
    """As `tl.block_type.__init__`."""
    sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    self.element_ty, (self.shape, self.numel, text) = element_ty, _block(sizes)
    self.name = f"<{text}, {element_ty}>"


@functools.cache
def _extent(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """The number of elements of a value and its shape, as Triton makes them."""
    made = object.__new__(tl.tensor)
    _tensor(made, None, tl.block_type(tl.int1, sizes) if sizes else tl.int1)
    return made.numel, made.shape


@functools.cache
def _block(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    """The shape of a type, its number of elements and its text, as Triton makes and checks them."""
    made = object.__new__(tl.block_type)
    _block_type(made, tl.int1, list(sizes))
    return made.shape, made.numel, str(made.shape)


_tensor, _block_type = tl.tensor.__init__, tl.block_type.__init__
_replaced: set[str] = set()
_number = functools.cache(interpreter._get_np_dtype)
interpreter.InterpretedFunction.__call__ = _call
interpreter._get_np_dtype = _np_dtype
TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
tl.tensor.__init__ = _new_tensor
tl.block_type.__init__ = _new_block_type
