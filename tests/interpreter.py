"""Triton's interpreter without its two largest costs, which no result depends on.

Before a kernel runs, the interpreter replaces the functions of `triton.language` and puts them back
afterwards. It replaces them again, looking through four modules, at every call of a function inside
the kernel; that took half of the time of a layer. Here only those of `triton.language.core`, which
a kernel's own module does not name, are replaced at such a call, and once.

An operation of a kernel takes it as long as thousands of elements do, so a loop over small pieces
is slow. The sort counts the ranks of slots in pieces of 8, as suits a GPU; here in pieces of 128.
`tests/ops/test_triton.py` shows that the result is the same.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

from reap_kernels.sort import gpu

SORT_CHUNK = gpu._CHUNK  # what the library uses
gpu._CHUNK = 128


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


_replaced: set[str] = set()
interpreter.InterpretedFunction.__call__ = _call
